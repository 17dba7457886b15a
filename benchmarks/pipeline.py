"""The stages of an image alone, beside the obvious alternatives, in alternating rounds.

    python -m benchmarks.pipeline --mmdet-python PYTHON --out benchmarks/results/pipeline.json

First every stage in the server's way and in others (`benchmarks/pipeline_stages.py`), at four
sizes of image and with 10 and 100 masks: CPU milliseconds of one thread. Then all post-processing
(NMS to run lengths) beside mmdetection's, of the same candidates (`benchmarks/candidates.py`), each
side in a process of its own: CPU time of one thread, and wall time with as many threads as each
side takes by itself. Before anything is measured, all ways must come to the same. Ratios are the
other's time over ours, round by round. Memory is what the first run in a new process adds to the
resident set at its peak, beside the candidates.

mmdetection is no dependency: `benchmarks/training.py` says how to make its interpreter. Without
one its table is left out, and the report says so.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from benchmarks.candidates import draw_candidates
from benchmarks.pipeline_plot import plot_stages
from benchmarks.pipeline_stages import LEAST_IOU, OURS, Stage, build_engine, build_stages
from benchmarks.report import (
    describe_machine,
    markdown_table,
    ratio_quartiles,
    this_command,
    write_report,
)
from benchmarks.worker import Worker

LARGE_HW = (3024, 4032)
SIZES_HW = ((256, 256), (480, 640), (1080, 1920), LARGE_HW)
COUNTS = (10, 100)
SCORE_TOLERANCE = 1e-5
LARGE_ROUNDS = 2
CELLS = "cells: ours ms, the other's ms: the other's time over ours (quartiles)"
Row = dict[str, Any]


def measure_ways(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each way by round, in turns."""
    laps: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began_s = time.process_time()
            way()
            laps[name].append(time.process_time() - began_s)
    return laps


def measure_stage(stage: Stage, rounds: int) -> list[Row]:
    """A row for each other way."""
    differences = stage.find_differences()  # warms up, too
    laps = measure_ways(stage.ways, rounds)
    return [
        {
            "stage": stage.name,
            "image_hw": stage.image_hw,
            "other": name,
            "ours_ms": 1e3 * float(np.median(laps[OURS])),
            "other_ms": 1e3 * float(np.median(laps[name])),
            **ratio_quartiles(laps[name], laps[OURS]),
            "difference": difference,
            "unit": stage.unit,
        }
        for name, difference in differences.items()
    ]


def check_equal(ours: Row, theirs: Row, image_hw: tuple[int, int]) -> float:
    """Least IoU of the masks.

    Raises:
        ValueError: Both sides did not find the same.
    """
    scores = np.array(ours["scores"]), np.array(theirs["scores"])
    same = ours["labels"] == theirs["labels"] and len(scores[0]) == len(scores[1])
    if not same or np.abs(scores[0] - scores[1]).max() > SCORE_TOLERANCE:
        raise ValueError("labels or scores differ from mmdetection's")
    sides = [
        [{"size": list(image_hw), "counts": counts.encode()} for counts in side["counts"]]
        for side in (ours, theirs)
    ]
    pairs = zip(*sides, strict=True)
    least = min(float(coco_mask.iou([a], [b], [0])[0, 0]) for a, b in pairs)
    if least < LEAST_IOU:
        raise ValueError(f"a mask differs from mmdetection's: IoU {least}")
    return least


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


def compare_mmdet(python: str, image_hw: tuple[int, int], count: int, rounds: int) -> list[Row]:
    """Post-processing beside mmdetection's, in turns, with one thread and with the default."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "case.npz"
        write_case(file, image_hw, count)
        with (
            Worker([sys.executable, "-m", "benchmarks.pipeline_ours", f"{file}"]) as a,
            Worker([python, "-m", "benchmarks.pipeline_mmdet", f"{file}"]) as b,
        ):
            first = a.ask("1"), b.ask("1")
            least_iou = check_equal(*first, image_hw)
            runs = {
                threads: [(a.ask(threads), b.ask(threads)) for _ in range(rounds)]
                for threads in ("1", "0")
            }
    return [
        {
            "image_hw": image_hw,
            "masks": count,
            "threads": "one, CPU time" if threads == "1" else "default, wall time",
            **summarise_runs(runs[threads], "cpu_s" if threads == "1" else "wall_s"),
            "least_iou": least_iou,
            "ours_added_mb": first[0]["added_bytes"] / 1e6,
            "mmdet_added_mb": first[1]["added_bytes"] / 1e6,
        }
        for threads in runs
    ]


def summarise_runs(runs: Sequence[tuple[Row, Row]], clock: str) -> Row:
    """Medians in ms, and the ratio of mmdetection's time to ours."""
    ours = [ours[clock]["all"] for ours, _ in runs]
    theirs = [sum(theirs[clock].values()) for _, theirs in runs]
    return {
        "ours_ms": 1e3 * float(np.median(ours)),
        "ours_nms_ms": 1e3 * float(np.median([ours[clock]["nms"] for ours, _ in runs])),
        "mmdet_ms": 1e3 * float(np.median(theirs)),
        **{
            f"mmdet_{stage}_ms": 1e3 * float(np.median([row[clock][stage] for _, row in runs]))
            for stage in ("nms", "paste", "encode")
        },
        **ratio_quartiles(theirs, ours),
    }


def _show_ratio(row: Row) -> str:
    return f"{row['ratio']:.3g} ({row['ratio_q1']:.3g}..{row['ratio_q3']:.3g})"


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
            + _show_ratio(row)
            for row in group
        }
        # Once if it is the same at all sizes.
        differences = [f"{row['difference']:.2g}" for row in group]
        difference = ", ".join(differences if len(set(differences)) > 1 else differences[:1])
        cells["difference"] = f"{difference} {group[0]['unit']}"
        shown.append({"stage": stage, "other": other, **cells})
    return shown


def show_mmdet(row: Row) -> Row:
    """A row for people."""
    parts = " + ".join(f"{row[f'mmdet_{stage}_ms']:.0f}" for stage in ("nms", "paste", "encode"))
    return {
        "image": _show_size(row["image_hw"]),
        "masks": row["masks"],
        "threads": row["threads"],
        "ours, ms": row["ours_ms"],
        "NMS alone": row["ours_nms_ms"],
        "mmdetection, ms": row["mmdet_ms"],
        "NMS + paste + RLE": parts,
        "mmdetection / ours": _show_ratio(row),
        "MB added": f"{row['ours_added_mb']:.0f}, {row['mmdet_added_mb']:.0f}",
        "least IoU": f"{row['least_iou']:.5f}",
    }


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pipeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5, help=f"at 3024x4032 {LARGE_ROUNDS}")
    parser.add_argument("--model", type=Path, default=Path("model_repo/nuclei"))
    parser.add_argument("--mmdet-python", help="interpreter that has mmdetection")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="picture to draw, .svg or .png")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    engine = measure_stage(build_engine(options.model), options.rounds)
    stages: list[Row] = []
    mmdet: list[Row] = []
    for image_hw in SIZES_HW:
        rounds = min(options.rounds, LARGE_ROUNDS) if image_hw == LARGE_HW else options.rounds
        for stage in build_stages(image_hw, COUNTS):
            stages += measure_stage(stage, rounds)
        for count in COUNTS if options.mmdet_python else ():
            mmdet += compare_mmdet(options.mmdet_python, image_hw, count, rounds)
    print(CELLS)
    for rows in (stages, engine):
        print("\n" + markdown_table(show_stages(rows)))
    if mmdet:
        print("\n" + markdown_table([show_mmdet(row) for row in mmdet]))
    else:
        print("\nmmdetection: not measured, no --mmdet-python")
    if options.out:
        variables = {options.mmdet_python: "$MMDET_PYTHON"} if options.mmdet_python else {}
        payload = {
            "machine": describe_machine(["pillow"]),
            "stages": [*engine, *stages],
            "mmdet": mmdet,
        }
        write_report(options.out, this_command("benchmarks.pipeline", variables), payload)
    if options.plot:
        print(plot_stages(stages, mmdet, options.plot) or f"drawn: {options.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
