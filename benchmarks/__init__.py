"""Measured comparisons; never timed tests. `python -m benchmarks` runs them."""
