"""How many cores this process really has: for the engine's threads and the pools."""

from __future__ import annotations

import math
import os
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")


def count_cores() -> int:
    """Physical cores that this process may run on, within its cgroup's quota; at least 1.

    Two hardware threads of one core count once: a matrix product gains nothing from the second.
    """
    allowed = _allowed_cpus()
    siblings = {_siblings(cpu) for cpu in allowed}
    cores = len(siblings) or len(allowed)
    quota = _quota(_CGROUP)
    if quota is not None:
        cores = min(cores, max(1, math.ceil(quota)))
    return max(1, cores)


def _allowed_cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _siblings(cpu: int) -> str:
    path = _TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list"
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return str(cpu)


def _quota(cgroup: Path) -> float | None:
    """Cores that the cgroup grants (v2, or v1 as containers mount it), None if unbounded."""
    try:
        quota, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text(encoding="ascii").strip()
        except OSError:
            return None
    if quota in ("max", "-1"):
        return None
    return int(quota) / int(period)
