"""Readers of image files: one module for each format, with `read_hw` and `open_file`."""
