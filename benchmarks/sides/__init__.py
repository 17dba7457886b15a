"""Sides of comparisons, run as child processes that answer lines."""
