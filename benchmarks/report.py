"""What the measurements' reports have in common: machine, ratios, table, file."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from service.cores import count_cores

PACKAGES = ("numpy", "onnxruntime", "opencv-python-headless", "pycocotools", "simplejpeg")
"""What decides how fast an image is served, whoever serves it."""

_CPU_INFO = Path("/proc/cpuinfo")


def describe_machine(packages: Iterable[str] = ()) -> dict[str, Any]:
    """The machine in general words and the versions of what runs on it.

    Args:
        packages: Distributions beside `PACKAGES`; one that is not installed has the version None.
    """
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _read_cpu_model(),
        "cores": count_cores(),
        "memory_gb": round(pages * page_bytes / 1e9),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": find_versions((*PACKAGES, *packages)),
    }


def find_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Versions of distributions; None where one is not installed."""
    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def ratio_quartiles(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """a over b, round by round: median and quartiles of the ratio.

    Args:
        a: One number for each round.
        b: The other's of the same rounds.

    Raises:
        ValueError: They are not equally many, or none.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} rounds of the one and {len(b)} of the other")
    low, middle, high = np.percentile(np.divide(a, b), [25, 50, 75])
    return {"ratio": float(middle), "ratio_q1": float(low), "ratio_q3": float(high)}


def show_quartiles(ratio: Mapping[str, float]) -> str:
    """First quartile, median and third quartile of `ratio_quartiles`, for a cell of a table."""
    return ", ".join(f"{ratio[key]:.2f}" for key in ("ratio_q1", "ratio", "ratio_q3"))


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """A table whose columns are the first row's keys; columns of numbers are aligned right.

    Raises:
        ValueError: There are no rows, or one has other columns.
    """
    if not rows:
        raise ValueError("there are no rows")
    columns = list(rows[0])
    for row in rows:
        if list(row) != columns:
            raise ValueError(f"a row has the columns {list(row)}, the first has {columns}")
    rules = ["---:" if _is_numeric(row[c] for row in rows) else "---" for c in columns]
    lines = [columns, rules, *([_show(row[c]) for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_report(path: Path, command: str, payload: Mapping[str, Any]) -> None:
    """Writes a report as JSON, the command first.

    Args:
        path: The file; its folder must be there.
        command: What was run, see `this_command`.
        payload: Everything else.
    """
    text = json.dumps({"command": command, **payload}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def this_command(module: str, variables: Mapping[str, str] | None = None) -> str:
    """The command line of this process, as `python -m MODULE ...`.

    Args:
        module: What was run.
        variables: By argument, what is written in its place: paths of this machine are nobody's.
    """
    names = variables or {}
    arguments = [names.get(argument) or shlex.quote(argument) for argument in sys.argv[1:]]
    return " ".join(["python", "-m", module, *arguments])


def _read_cpu_model() -> str:
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _is_numeric(values: Iterable[object]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _show(value: object) -> str:
    """Three digits are as many as any measurement here has."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
