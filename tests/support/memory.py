"""Memory of another process, from /proc."""

from __future__ import annotations

from pathlib import Path


def _read_status(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/{pid}/status has no {name}")


def read_resident_bytes(pid: int) -> int:
    """What it holds now."""
    return _read_status(pid, "VmRSS")


def read_peak_bytes(pid: int) -> int:
    """The most it has held since `reset_peak`."""
    return _read_status(pid, "VmHWM")


def reset_peak(pid: int) -> None:
    """Begins a new peak at what it holds now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")
