"""Runs the rows of a table of the paper and prints the results beside the paper's.

Every run has a folder, `<out>/<base>-<digest of the configuration>/seed<n>`, with its checkpoints
and, when it is finished, `result.json`. A finished run is not repeated, an unfinished one is
resumed from its checkpoint, and a configuration that is in several tables is run once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from training import distributed
from training.configs.io import config_to_dict
from training.configs.schema import Config
from training.configs.tables import Table, TableRow

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
RESULT_FILE = "result.json"
TrainOne = Callable[[Config, Path, int], dict[str, float]]
"""Trains a configuration in a folder with a seed; returns its metrics, AP in 0..1."""


def row_config(row: TableRow, base: Config) -> Config:
    """The configuration of a row; its name ends in a digest of all its fields."""
    config = replace(row.change(base), name="", description="")
    text = json.dumps(config_to_dict(config), sort_keys=True)
    return replace(config, name=f"{base.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}")


def select_rows(table: Table, names: Sequence[str]) -> tuple[TableRow, ...]:
    """The rows of a table with these names; all rows if there are no names.

    Raises:
        ValueError: The table has no row of a name; lists those that it has.
    """
    known = {row.name: row for row in table.rows}
    for name in names:
        if name not in known:
            raise ValueError(f"table {table.key} has no row {name!r}; it has {', '.join(known)}")
    return tuple(known[name] for name in names) if names else table.rows


def run_row(
    row: TableRow, base: Config, out: Path, seed: int, train_one: TrainOne
) -> dict[str, float]:
    """Metrics of a row with a seed; those of a finished run are read from its file."""
    config = row_config(row, base)
    folder = out / config.name / f"seed{seed}"
    path = folder / RESULT_FILE
    metrics: dict[str, float] | None = None
    if distributed.is_main() and path.exists():
        metrics = json.loads(path.read_text())["metrics"]
    metrics = distributed.from_main(metrics)
    if metrics is None:
        metrics = train_one(config, folder, seed)
        content = {"row": row.name, "config": config_to_dict(config), "metrics": metrics}
        if distributed.is_main():
            _write(path, content)
    return metrics


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2))
    os.replace(partial, path)


def _cell(values: Sequence[float]) -> str:
    """Mean in percent, with the standard deviation over the seeds; -1 means no such objects."""
    percent = [100 * v for v in values]
    if min(percent) < 0:
        return "-"
    if len(percent) == 1:
        return f"{percent[0]:.1f}"
    return f"{fmean(percent):.1f} ± {stdev(percent):.1f}"


def format_table(
    table: Table, rows: Sequence[TableRow], results: Mapping[str, Sequence[Mapping[str, float]]]
) -> str:
    """A Markdown table of the metrics in percent, with those of the paper in the last columns.

    Args:
        table: The table of the paper.
        rows: The rows in order.
        results: By row name, the metrics of every seed; rows without results are left out.
    """
    told = [m for m in METRICS if any(m in row.paper for row in rows)] or ["AP"]
    header = ["", *METRICS, *(f"paper {m}" for m in told)]
    lines = [
        f"Table {table.key}: {table.title} (paper: {table.note})",
        "",
        f"| {' | '.join(header)} |",
        f"| {' | '.join(['---'] * len(header))} |",
    ]
    for row in rows:
        if not results.get(row.name):
            continue
        cells = [_cell([r[m] for r in results[row.name]]) for m in METRICS]
        paper = [f"{row.paper[m]:.1f}" if m in row.paper else "" for m in told]
        lines.append(f"| {' | '.join([row.name, *cells, *paper])} |")
    return "\n".join(lines)


def run_table(
    table: Table,
    base: Config,
    out: Path,
    *,
    rows: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    train_one: TrainOne,
) -> str:
    """Runs what is not finished and returns the table; also written to `out/table_<key>.md`.

    All rows are run with one seed before the next seed, so that a complete table is there early.

    Raises:
        ValueError: There is no such row, or a seed is given twice.
    """
    chosen = select_rows(table, rows)
    if len(set(seeds)) != len(seeds) or not seeds:
        raise ValueError(f"seeds are {list(seeds)}, expected one or more different ones")
    results: dict[str, list[dict[str, float]]] = {row.name: [] for row in chosen}
    text = ""
    for seed in seeds:
        for row in chosen:
            results[row.name].append(run_row(row, base, out, seed, train_one))
            text = format_table(table, chosen, results)
            if distributed.is_main():
                (out / f"table_{table.key}.md").write_text(text + "\n")
    return text
