"""How fast this system is, next to what bounds it and to what a user would pick instead."""
