"""The stages of an image beside the obvious alternatives, and post-processing beside mmdetection's.

Every stage in the server's way and in others (benchmarks/pipeline_ways.py), at four sizes of image
and with 10 and 100 masks: CPU time of one thread. Then all post-processing (NMS to run lengths) of
the same candidates beside mmdetection's, each side in a process of its own: CPU time of one thread,
and wall time with each side's default threads. Results are compared before anything is timed.
Ratios are the other's time over ours. Memory is what the first run of a new process adds to the
resident set at its peak, beside the candidates.

`python -m benchmarks training --help` says how to make mmdetection's interpreter.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from benchmarks.candidates import draw_candidates
from benchmarks.harness import BenchmarkError
from benchmarks.harness.plots import Panel
from benchmarks.harness.process import ChildProcess
from benchmarks.harness.report import Report, Row
from benchmarks.harness.rounds import Samples, take_turns, timed
from benchmarks.inputs import NUCLEI
from benchmarks.pipeline_ways import LEAST_IOU, OURS, PipelineStage, build_engine, build_stages

LARGE_HW = (3024, 4032)
SIZES_HW = ((256, 256), (480, 640), (1080, 1920), LARGE_HW)
COUNTS = (10, 100)
SCORE_TOLERANCE = 1e-5
LARGE_ROUNDS = 2
MMDET = "mmdetection"
CELLS = "cells: ours ms, the other's ms: the other's time over ours (range)"


def pipeline(
    *,
    rounds: Annotated[int, f"that count; {LARGE_ROUNDS} at 3024x4032"] = 5,
    model: Annotated[Path, "folder of the model whose engine is timed"] = NUCLEI,
    mmdet_python: Annotated[Path | None, "interpreter that has mmdetection 3.3"] = None,
) -> Report:
    cv2.setNumThreads(1)
    engine = measure_stage(build_engine(model), rounds)
    stages: list[Row] = []
    mmdet: list[Row] = []
    for image_hw in SIZES_HW:
        count = min(rounds, LARGE_ROUNDS) if image_hw == LARGE_HW else rounds
        for stage in build_stages(image_hw, COUNTS):
            stages += measure_stage(stage, count)
        for masks in COUNTS if mmdet_python else ():
            mmdet += compare_mmdet(str(mmdet_python), image_hw, masks, count)
    tables = {CELLS: show_stages(stages), "the engine": show_stages(engine)}
    if mmdet:
        tables[MMDET] = [show_mmdet(row) for row in mmdet]
    return Report(
        data={"stages": [*engine, *stages], "mmdet": mmdet},
        tables=tables,
        notes=[] if mmdet else ["mmdetection: not measured, no --mmdet-python"],
        packages=("pillow",),
        panels=build_panels(stages, mmdet),
    )


def measure_stage(stage: PipelineStage, rounds: int) -> list[Row]:
    """A row for each other way."""
    differences = stage.find_differences()  # warms up, too
    ways = {name: timed(way) for name, way in stage.ways.items()}
    samples = take_turns(ways, rounds, warm_ups=0)
    return [
        {
            "stage": stage.name,
            "image_hw": stage.image_hw,
            "other": name,
            "ours_ms": 1e3 * samples.median(OURS, "cpu_s"),
            "other_ms": 1e3 * samples.median(name, "cpu_s"),
            "ratio": asdict(samples.ratio(name, OURS, "cpu_s")),
            "shown_ratio": str(samples.ratio(name, OURS, "cpu_s")),
            "difference": difference,
            "unit": stage.unit,
        }
        for name, difference in differences.items()
    ]


def compare_mmdet(python: str, image_hw: tuple[int, int], count: int, rounds: int) -> list[Row]:
    """Post-processing beside mmdetection's, with one thread and with the default."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "case.npz"
        write_case(file, image_hw, count)
        with (
            ChildProcess([sys.executable, "-m", "benchmarks.sides.pipeline_ours", f"{file}"]) as a,
            ChildProcess([python, "-m", "benchmarks.sides.pipeline_mmdet", f"{file}"]) as b,
        ):
            sides = {OURS: a, MMDET: b}
            first = {name: side.ask("1") for name, side in sides.items()}
            least_iou = check_equal(first[OURS], first[MMDET], image_hw)
            rows = []
            for threads, clock in (("1", "cpu_s"), ("0", "wall_s")):
                variants = {name: partial(side.ask, threads) for name, side in sides.items()}
                samples = take_turns(variants, rounds, warm_ups=0)
                rows.append({"clock": clock, **summarise(samples, clock)})
    return [
        {
            "image_hw": image_hw,
            "masks": count,
            **row,
            "least_iou": least_iou,
            "ours_added_mb": first[OURS]["added_bytes"] / 1e6,
            "mmdet_added_mb": first[MMDET]["added_bytes"] / 1e6,
        }
        for row in rows
    ]


def write_case(file: Path, image_hw: tuple[int, int], count: int) -> None:
    """Candidates for both sides."""
    prepared, candidates = draw_candidates(image_hw, count)
    np.savez(
        file,
        mask_probs=candidates.mask_probs,
        scores=candidates.scores,
        labels=candidates.labels,
        valid_hw=prepared.tiles[0].valid_hw,
        image_hw=image_hw,
        count=count,
    )


def check_equal(ours: Row, theirs: Row, image_hw: tuple[int, int]) -> float:
    """Least IoU of the masks.

    Raises:
        BenchmarkError: The sides did not find the same.
    """
    scores = np.array(ours["scores"]), np.array(theirs["scores"])
    same = ours["labels"] == theirs["labels"] and len(scores[0]) == len(scores[1])
    if not same or np.abs(scores[0] - scores[1]).max() > SCORE_TOLERANCE:
        raise BenchmarkError("labels or scores differ from mmdetection's")
    sides = [
        [{"size": list(image_hw), "counts": counts.encode()} for counts in side["counts"]]
        for side in (ours, theirs)
    ]
    pairs = zip(*sides, strict=True)
    least = min(float(coco_mask.iou([a], [b], [0])[0, 0]) for a, b in pairs)
    if least < LEAST_IOU:
        raise BenchmarkError(f"a mask differs from mmdetection's: IoU {least}")
    return least


def summarise(samples: Samples, clock: str) -> Row:
    """Medians in ms, and the ratio of mmdetection's time to ours."""
    stages = ("nms", "paste", "encode")
    of_stage = [samples.values[MMDET][f"{stage}_{clock}"] for stage in stages]
    samples.values[MMDET][f"all_{clock}"] = np.sum(of_stage, axis=0).tolist()
    ratio = samples.ratio(MMDET, OURS, f"all_{clock}")
    return {
        "ours_ms": 1e3 * samples.median(OURS, f"all_{clock}"),
        "ours_nms_ms": 1e3 * samples.median(OURS, f"nms_{clock}"),
        "mmdet_ms": 1e3 * samples.median(MMDET, f"all_{clock}"),
        **{f"mmdet_{n}_ms": 1e3 * samples.median(MMDET, f"{n}_{clock}") for n in stages},
        "ratio": asdict(ratio),
        "shown_ratio": str(ratio),
    }


def _show_size(image_hw: Sequence[int]) -> str:
    return f"{image_hw[1]}x{image_hw[0]}"


def show_stages(rows: Sequence[Row]) -> list[Row]:
    """A row for each stage and other way, the sizes side by side."""
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row["stage"], row["other"]), []).append(row)
    shown = []
    for (stage, other), group in grouped.items():
        cells = {
            _show_size(row["image_hw"]): f"{row['ours_ms']:.3g}, {row['other_ms']:.3g}: "
            + row["shown_ratio"]
            for row in group
        }
        # Once if it is the same at all sizes.
        differences = [f"{row['difference']:.2g}" for row in group]
        difference = ", ".join(differences if len(set(differences)) > 1 else differences[:1])
        cells["difference"] = f"{difference} {group[0]['unit']}"
        shown.append({"stage": stage, "other": other, **cells})
    return shown


def show_mmdet(row: Row) -> Row:
    """A row of the table."""
    parts = " + ".join(f"{row[f'mmdet_{stage}_ms']:.0f}" for stage in ("nms", "paste", "encode"))
    return {
        "image": _show_size(row["image_hw"]),
        "masks": row["masks"],
        "time": "CPU, one thread" if row["clock"] == "cpu_s" else "wall, default threads",
        "ours, ms": row["ours_ms"],
        "NMS alone": row["ours_nms_ms"],
        "mmdetection, ms": row["mmdet_ms"],
        "NMS + paste + RLE": parts,
        "mmdetection / ours": row["shown_ratio"],
        "MB added": f"{row['ours_added_mb']:.0f}, {row['mmdet_added_mb']:.0f}",
        "least IoU": f"{row['least_iou']:.5f}",
    }


def build_panels(stages: Sequence[Row], mmdet: Sequence[Row]) -> list[Panel]:
    """Milliseconds over megapixels, a panel for each stage, a line for each way."""
    panels: dict[str, dict[str, dict[float, float]]] = {}

    def add(stage: str, way: str, row: Row, ms: Any) -> None:
        megapixels = row["image_hw"][0] * row["image_hw"][1] / 1e6
        panels.setdefault(stage, {}).setdefault(way, {})[megapixels] = ms

    for row in stages:
        add(row["stage"], OURS, row, row["ours_ms"])
        add(row["stage"], row["other"], row, row["other_ms"])
    for row in mmdet:
        if row["clock"] == "cpu_s":
            title = f"NMS to RLE, {row['masks']} masks"
            add(title, OURS, row, row["ours_ms"])
            add(title, MMDET, row, row["mmdet_ms"])
    return [
        Panel(
            title=title,
            x="megapixels",
            y="CPU ms",
            lines={way: list(points.items()) for way, points in ways.items()},
            log="xy",
        )
        for title, ways in panels.items()
    ]
