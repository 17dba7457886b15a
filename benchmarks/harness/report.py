"""The report of a benchmark: tables for people, JSON with machine, versions, commit, command."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.harness.plots import Panel
from service.cores import count_cores
from service.engines.cpu import read_cpu

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("benchmarks/results")
PACKAGES = ("numpy", "onnxruntime", "opencv-python-headless", "pycocotools", "simplejpeg")
"""They decide how fast an image is served, whatever the server."""
Row = dict[str, Any]


@dataclass(kw_only=True)
class Report:
    """What a benchmark found.

    Attributes:
        data: For the JSON file.
        tables: Rows by title.
        notes: Lines below the tables.
        packages: Distributions beside `PACKAGES` whose versions matter.
        panels: Of the plot.
        failures: Faults found; the command exits 1 if there are any.
    """

    data: Mapping[str, Any]
    tables: Mapping[str, Sequence[Mapping[str, object]]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    packages: Sequence[str] = ()
    panels: Sequence[Panel] = ()
    failures: Sequence[str] = ()

    def render(self) -> str:
        """Markdown."""
        parts = []
        for title, rows in self.tables.items():
            parts += [f"{title}:"] if title else []
            parts += [markdown_table(rows)]
        return "\n\n".join([*parts, *self.notes])


def write_report(path: Path, report: Report, command: Sequence[str]) -> None:
    """Writes the JSON; its folder is made if it is missing.

    Args:
        path: The file.
        report: What was found.
        command: The words of the command line.
    """
    content = {
        "command": describe_command(command),
        "commit": describe_commit(ROOT),
        "machine": describe_machine(report.packages),
        **report.data,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def describe_command(words: Sequence[str]) -> str:
    """A command line; an absolute path, which means nothing elsewhere, as `$FLAG`."""
    shown, flag = [words[0]], "--path"
    for word in words[1:]:
        flag = word if word.startswith("--") else flag
        variable = "$" + flag.removeprefix("--").replace("-", "_").upper()
        shown.append(variable if word.startswith("/") else shlex.quote(word))
    return " ".join(shown)


def describe_commit(root: Path) -> str | None:
    """The commit of a checkout, `-dirty` if files were changed; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def describe_machine(packages: Iterable[str] = ()) -> dict[str, Any]:
    """The machine in general words and the versions of what runs on it.

    Args:
        packages: Distributions beside `PACKAGES`; one that is not installed has the version None.
    """
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": read_cpu()[0] or platform.machine(),
        "cores": count_cores(),
        "memory_gb": round(pages * page_bytes / 1e9),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: find_version(name) for name in (*PACKAGES, *packages)},
    }


def find_version(package: str) -> str | None:
    """Version of a distribution; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """A table with the first row's keys as columns; columns of numbers are aligned right.

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


def _is_numeric(values: Iterable[object]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _show(value: object) -> str:
    """Numbers with three digits: no measurement here has more."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
