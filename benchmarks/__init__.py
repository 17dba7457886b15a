"""Measurements of the running code; not tests."""
