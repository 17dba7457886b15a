"""The processor of this machine, as far as the system tells."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")


def read_cpu(file: Path = CPU_INFO) -> tuple[str, str]:
    """Name of the processor, and its instruction sets in alphabetical order; may be empty."""
    found = {"model name": "", "flags": "", "Features": "", "CPU part": ""}
    with suppress(OSError):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in found:
                found[name.strip()] = value.strip()
            elif not line.strip() and any(found.values()):  # the end of the first core
                break
    name = found["model name"] or found["CPU part"] or platform.processor()
    return name, " ".join(sorted((found["flags"] or found["Features"]).split()))
