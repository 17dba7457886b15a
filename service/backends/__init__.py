"""Engines behind one protocol; one file for each."""
