"""Memory of this process, now and at its peak (Linux); standard library alone."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Callable
from pathlib import Path


def resident_bytes() -> int:
    """The resident set."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def forget_peak() -> None:
    """Sets the peak of the resident set back to its present size."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The largest resident set since `forget_peak`.

    Raises:
        RuntimeError: The system does not say.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM; peak memory is measured on Linux only")


def added_bytes(step: Callable[[], object]) -> int:
    """What a step adds to the resident set at its peak.

    Memory that was freed before but not yet given back to the system would hide it, so it is given
    back first, where the C library can.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    forget_peak()
    before = resident_bytes()
    step()
    return peak_bytes() - before
