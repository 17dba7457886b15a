"""python -m benchmarks: what one image costs on this machine, stage by stage.

Prints a table and, with --json, writes the numbers with the command that made them. With
`--clock cpu` times are CPU seconds of the process, which other work on the machine hardly changes;
with one thread that is the time on an idle core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.report import this_command, write_report
from pipeline.decode import decode_image
from pipeline.encode import instance_to_coco
from pipeline.postprocess import TileCandidates, postprocess
from pipeline.preprocess import prepare
from pipeline.types import Prepared
from service.cores import count_cores
from service.engines.base import BackendOptions
from service.models.repository import LoadedModel, load_version

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
STAGES = ("decode", "prepare", "engine", "postprocess", "encode")


def _infer(model: LoadedModel, prepared: Prepared) -> list[TileCandidates]:
    batch = model.config.limits.max_batch
    starts = range(0, len(prepared.tiles), batch)
    return [c for i in starts for c in model.backend.infer(prepared.tiles[i : i + batch])]


def measure_image(
    model: LoadedModel, data: bytes, repeats: int, now: Callable[[], float]
) -> dict[str, float]:
    """Median milliseconds of each stage for one encoded image, and what was in it."""
    laps = []
    for _ in range(repeats + 1):
        clock = [now()]
        image = decode_image(data)
        clock.append(now())
        prepared = prepare(image, model.config.input)
        clock.append(now())
        candidates = _infer(model, prepared)
        clock.append(now())
        found = postprocess(prepared, candidates, model.config.postprocess)
        clock.append(now())
        for instance in found:
            instance_to_coco(instance, model.config)
        clock.append(now())
        laps.append(np.diff(clock))
    stages = 1e3 * np.median(laps[1:], axis=0)  # the first lap warms up
    row = {f"{stage}_ms": float(ms) for stage, ms in zip(STAGES, stages, strict=True)}
    row["total_ms"] = float(stages.sum())
    return {**row, "tiles": len(prepared.tiles), "instances": len(found)}


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("model_repo/nuclei"))
    parser.add_argument("--images", type=Path, default=Path("tests/data/nuclei/images"))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=count_cores())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = load_version(options.model, options=BackendOptions(threads=options.threads))
    rows = {}
    print(
        f"{'image':>28} {'tiles':>5} {'found':>5} " + " ".join(f"{s:>11}" for s in STAGES), "total"
    )
    for path in sorted(options.images.iterdir()):
        row = measure_image(model, path.read_bytes(), options.repeats, CLOCKS[options.clock])
        rows[path.name] = row
        stages = " ".join(f"{row[f'{stage}_ms']:8.1f} ms" for stage in STAGES)
        counts = f"{row['tiles']:5} {row['instances']:5}"
        print(f"{path.name:>28} {counts} {stages} {row['total_ms']:.1f} ms")
    if options.json:
        content = {
            "model": f"{model.config.name} {model.version}",
            "clock": options.clock,
            "threads": options.threads,
            "rows": rows,
        }
        write_report(options.json, this_command("benchmarks"), content)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
