"""Memory of this process, now and at its peak (Linux); standard library alone."""

from __future__ import annotations

import resource
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
