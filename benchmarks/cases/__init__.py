"""The benchmarks: each a function in a file of its own name."""
