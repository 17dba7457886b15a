"""Runs the rows of a table of the paper and prints the results beside the paper's.

Every run has a folder, `<out>/<table>-<row>-<digest>/seed<n>`, with its checkpoints and, when it is
finished, `result.json`. The digest covers everything that the weights depend on, so a configuration
that is in several tables is trained once, and a finished run is only evaluated again if what it is
evaluated on has changed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from service.files import replace_text
from training import distributed
from training.configs.io import config_to_dict
from training.configs.schema import Config
from training.configs.tables import Change, Table, TableRow

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
FPS = "fps"
RESULT_FILE = "result.json"
CODE_VERSION = 1
"""To be raised with every change of the code that changes the weights or the metrics of a run."""


@dataclass(frozen=True)
class RunResult:
    """Metrics of a run, AP in 0..1; images per second on a device, and its name."""

    metrics: Mapping[str, float]
    fps: float
    device: str


@dataclass(frozen=True)
class TablePlan:
    """What the runs of a table have in common.

    Attributes:
        configure: The configuration of a row's change, with the options of the command line.
        training: What the weights depend on besides configuration and seed; JSON types.
        evaluation: What the metrics depend on besides the weights; JSON types.
        train: Trains a configuration in a folder with a seed, or resumes that; the last argument
            names the run.
        restart: Whether finished and unfinished runs are started again.
    """

    configure: Callable[[Change], Config]
    training: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    train: Callable[[Config, Path, int, str], RunResult]
    restart: bool = False

    def row_config(self, row: TableRow) -> Config:
        """The configuration of a row; its name ends in a digest of all that the weights depend on.

        Raises:
            ValueError: The command line does not fit the row; names the row.
        """
        try:
            config = self.configure(row.change)
        except ValueError as error:
            raise ValueError(f"row {row.name!r}: {error}") from error
        content = config_to_dict(replace(config, name="", description=""))
        text = json.dumps([CODE_VERSION, content, dict(self.training)], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        return replace(config, name=f"{config.name}-{digest}", description="")


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


def run_folder(out: Path, table: Table, row: TableRow, config: Config) -> Path:
    """Folder of a row's runs: that of a row with the same configuration, else a new one."""
    digest = config.name.rpartition("-")[2]
    found = sorted(out.glob(f"*-{digest}")) if distributed.is_main() else []
    slug = re.sub(r"[^a-z0-9]+", "-", row.name.lower()).strip("-")
    return distributed.from_main(found[0] if found else out / f"{table.key}-{slug}-{digest}")


def run_row(table: Table, row: TableRow, out: Path, seed: int, plan: TablePlan) -> RunResult:
    """Result of a row with a seed; that of a finished run is read from its file."""
    config = plan.row_config(row)
    folder = run_folder(out, table, row, config) / f"seed{seed}"
    path = folder / RESULT_FILE
    if distributed.is_main() and plan.restart:
        for name in (RESULT_FILE, "last.pt", "best.pt"):
            (folder / name).unlink(missing_ok=True)
    stored = _read(path, plan.evaluation) if distributed.is_main() else None
    result = distributed.from_main(stored)
    if result is None:
        result = plan.train(config, folder, seed, f"table {table.key}, {row.name}, seed {seed}")
        content = {
            "row": row.name,
            "seed": seed,
            "config": config_to_dict(config),
            "training": {"code_version": CODE_VERSION, **plan.training},
            "evaluation": dict(plan.evaluation),
            **asdict(result),
        }
        if distributed.is_main():
            replace_text(path, json.dumps(content, indent=2))
    return result


def _read(path: Path, evaluation: Mapping[str, Any]) -> RunResult | None:
    """The result of a finished run, if it was evaluated in this way."""
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    if content["evaluation"] != evaluation:
        return None
    return RunResult(content["metrics"], content["fps"], content["device"])


def _cell(values: Sequence[float], factor: float = 100) -> str:
    """Mean, with the standard deviation over the seeds; -1 means no such objects."""
    scaled = [factor * v for v in values]
    if min(scaled) < 0:
        return "-"
    if len(scaled) == 1:
        return f"{scaled[0]:.1f}"
    return f"{fmean(scaled):.1f} ± {stdev(scaled):.1f}"


def format_table(
    table: Table,
    rows: Iterable[TableRow],
    results: Mapping[str, Sequence[RunResult]],
    *,
    split: str,
    max_dets: int,
) -> str:
    """A Markdown table of the metrics in percent, with those of the paper in the last columns.

    Args:
        table: The table of the paper.
        rows: The rows in order.
        results: By row name, those of every seed; rows without results are left out.
        split: On which the results were measured.
        max_dets: Detections per image.
    """
    rows = [row for row in rows if results.get(row.name)]
    told = [m for m in (*METRICS, FPS) if any(m in row.paper for row in table.rows)]
    speed = FPS in told
    devices = sorted({r.device for row in rows for r in results[row.name]})
    paper = f"{table.schedule} schedule, {table.split}, at most 100 detections per image"
    here = f"{split}, at most {max_dets} detections per image"
    if speed:
        paper, here = f"{paper}, fps on a V100", f"{here}, fps on {', '.join(devices)}"
    header = ["", *(f"{m} ({split})" for m in METRICS), *(["fps (here)"] if speed else [])]
    header += [f"paper {m}" if m == FPS else f"paper {m} ({table.split})" for m in told]
    lines = [
        table.heading,
        f"Paper: {paper}{'; ' if table.note else ''}{table.note}.",
        f"Here: {here}.",
        "",
        f"| {' | '.join(header)} |",
        f"| {' | '.join(['---'] * len(header))} |",
    ]
    for row in rows:
        found = results[row.name]
        cells = [_cell([r.metrics[m] for r in found]) for m in METRICS]
        cells += [_cell([r.fps for r in found], 1)] if speed else []
        cells += [f"{row.paper[m]:.1f}" if m in row.paper else "" for m in told]
        lines.append(f"| {' | '.join([row.name, *cells])} |")
    return "\n".join(lines)


def run_table(
    table: Table,
    plan: TablePlan,
    out: Path,
    *,
    rows: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
) -> str:
    """Runs what is not finished and returns the table; also written to `out/table_<key>.md`.

    All rows are run with one seed before the next seed, so that a complete table is there early.

    Raises:
        ValueError: There is no such row, a seed is given twice, or the command line does not fit
            a row; before the first run.
    """
    chosen = select_rows(table, rows)
    if len(set(seeds)) != len(seeds) or not seeds:
        raise ValueError(f"seeds are {list(seeds)}, expected one or more different ones")
    for row in chosen:
        plan.row_config(row)
    results: dict[str, list[RunResult]] = {row.name: [] for row in chosen}
    split, max_dets = plan.evaluation["split"], plan.evaluation["max_dets"]
    text = ""
    for seed in seeds:
        for row in chosen:
            results[row.name].append(run_row(table, row, out, seed, plan))
            text = format_table(table, chosen, results, split=split, max_dets=max_dets)
            if distributed.is_main():
                (out / f"table_{table.key}.md").write_text(text + "\n")
    return text
