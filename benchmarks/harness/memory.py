"""Resident memory of a process, now and at its peak (Linux); standard library only."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

SELF = "self"


def read_status(name: str, pid: int | str = SELF) -> int:
    """Bytes of a field of /proc/PID/status: VmRSS now, VmHWM the peak since `reset_peak`.

    Raises:
        RuntimeError: The system does not have it.
    """
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/status has no {name}: memory is measured on Linux only")


def reset_peak(pid: int | str = SELF) -> None:
    """The peak is from now on that since this call."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")


def added_bytes(step: Callable[[], object], pid: int | str = SELF) -> int:
    """What a step adds to the resident set at its peak.

    In this process, freed memory that the C library still holds is given back first: it would hide
    what the step adds.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if pid == SELF else None
    if trim is not None:
        trim(0)
    reset_peak(pid)
    before = read_status("VmRSS", pid)
    step()
    return read_status("VmHWM", pid) - before
