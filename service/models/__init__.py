"""Served models: the repository on disk, the store, replacing engines."""
