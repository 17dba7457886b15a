"""What all benchmarks share: command line, rounds, child processes, load, reports, plots."""


class BenchmarkError(Exception):
    """A benchmark cannot run, or its sides do not compute the same."""
