"""Searches of an experiment's settings by Ray Tune: each trial is a run like any other."""
