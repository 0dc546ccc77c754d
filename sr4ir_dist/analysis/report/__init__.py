"""A report: runs, their settings, curves, figures and images on one page that needs no other."""
