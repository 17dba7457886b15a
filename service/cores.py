"""Number of CPU cores available to this process; the default size of thread pools."""

from __future__ import annotations

import math
import os
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def count_cores() -> int:
    """Physical cores in the CPU affinity mask, limited by the cgroups' CPU quotas; at least 1.

    Hyper-threads of one core count once: matrix products do not gain from the second.
    """
    allowed = _allowed_cpus()
    siblings = {_siblings(cpu) for cpu in allowed}
    cores = len(siblings) or len(allowed)
    quota = _quota()
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


def _quota() -> float | None:
    """Least CPU quota, in cores, of this process's cgroup and those above it; None if unlimited."""
    quotas = [quota for folder in list_cgroups("cpu") if (quota := _read_quota(folder)) is not None]
    return min(quotas, default=None)


def list_cgroups(controller: str) -> list[Path]:
    """Folders of this process's cgroup and of those above it; a container's own is the root.

    Args:
        controller: Of version 1, which has a hierarchy for each.
    """
    found = [_CGROUP, _CGROUP / controller]
    try:
        lines = _OWN_CGROUP.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return found
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUP / controller if controllers else _CGROUP
        folder = root / path.lstrip("/")
        found += [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]
    return found


def _read_quota(cgroup: Path) -> float | None:
    try:
        quota, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (cgroup / "cpu.cfs_period_us").read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
    try:
        return None if int(quota) < 0 else int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max" is no limit
        return None
