"""Memory of another process."""

from __future__ import annotations

from benchmarks.harness.memory import read_status


def read_resident_bytes(pid: int) -> int:
    """What it holds now."""
    return read_status("VmRSS", pid)


def read_peak_bytes(pid: int) -> int:
    """The most it has held since `reset_peak`."""
    return read_status("VmHWM", pid)
