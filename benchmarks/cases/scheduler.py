"""The scheduling layer alone, before beside after: CPU time of an image with a stub engine.

    git worktree add ../before 8104970
    python -m benchmarks scheduler --before ../before

Each side is a stand-alone script, benchmarks/sides/scheduler_SIDE.py, run with its checkout as
PYTHONPATH; a side without a script is not measured. Its contract:

- its argument is JSON: `max_batch` canvases in an engine call, `max_delay_s` for a batch to fill,
  `infer_s` that the stub engine sleeps in a call, `clients` images in flight;
- it reads lines `{"images": N, "canvases": M}`, passes N images of M canvases of one shape through
  decoding (which does nothing), batching, engine and post-processing (nothing either), `clients` at
  a time, and answers `{"images": N, "cpu_s": S, "wall_s": S}` of that alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

from benchmarks.harness.process import ChildProcess
from benchmarks.harness.report import ROOT, Report, Row, describe_commit
from benchmarks.harness.rounds import Samples, take_turns

BEFORE, AFTER = "before", "after"
SIDES = ROOT / "benchmarks" / "sides"


def scheduler(
    *,
    before: Annotated[Path, "checkout of commit 8104970"],
    after: Annotated[Path, "checkout that is compared with it"] = ROOT,
    canvases: Annotated[tuple[int, ...], "of an image"] = (1, 9),
    images: Annotated[int, "of each measurement"] = 2000,
    clients: Annotated[int, "images in flight"] = 64,
    max_batch: Annotated[int, "canvases in an engine call"] = 8,
    max_delay_ms: Annotated[float, "that a batch waits to fill"] = 5,
    infer_ms: Annotated[float, "that the stub engine sleeps in a call"] = 0,
    rounds: Annotated[int, "that count"] = 7,
) -> Report:
    options = {
        "max_batch": max_batch,
        "max_delay_s": max_delay_ms / 1e3,
        "infer_s": infer_ms / 1e3,
        "clients": clients,
    }
    trees = {BEFORE: before.resolve(), AFTER: after.resolve()}
    scripts = {side: SIDES / f"scheduler_{side}.py" for side in trees}
    missing = [f"{side}: no {file.name}" for side, file in scripts.items() if not file.is_file()]
    found: dict[int, Samples] = {}
    with ExitStack() as stack:
        sides = {
            side: stack.enter_context(run_side(scripts[side], tree, options))
            for side, tree in trees.items()
            if scripts[side].is_file()
        }
        for count in canvases:
            variants = {s: ask(process, images, count) for s, process in sides.items()}
            found[count] = take_turns(variants, rounds)
    rows = [row for count, samples in found.items() for row in build_rows(count, samples)]
    data = {
        "commits": {side: describe_commit(tree) for side, tree in trees.items()},
        "options": {**options, "images": images},
        "us_per_image": {count: samples.values for count, samples in found.items()},
    }
    return Report(data=data, tables={"": rows}, notes=[f"not measured: {m}" for m in missing])


def run_side(script: Path, tree: Path, options: dict[str, Any]) -> ChildProcess:
    """A side's process: the modules of its own checkout, and nothing beside its script."""
    command = [sys.executable, "-P", f"{script}", json.dumps(options)]
    return ChildProcess(command, folder=tree, environment={"PYTHONPATH": f"{tree}"})


def ask(process: ChildProcess, images: int, canvases: int) -> Callable[[], dict[str, float]]:
    """A variant: microseconds of an image."""

    def run() -> dict[str, float]:
        answer = process.ask(json.dumps({"images": images, "canvases": canvases}))
        return {clock: 1e6 * answer[f"{clock}_s"] / answer["images"] for clock in ("cpu", "wall")}

    return run


def build_rows(canvases: int, samples: Samples) -> list[Row]:
    """A row for each side."""
    return [
        {
            "canvases": canvases,
            "side": side,
            "CPU us an image": samples.median(side, "cpu"),
            "wall us an image": samples.median(side, "wall"),
            "CPU of before's (range)": str(samples.ratio(side, next(iter(samples.values)), "cpu")),
        }
        for side in samples.values
    ]
