"""Weights: where published ones are, how files are read and written, `solo-import`, `--init`."""
