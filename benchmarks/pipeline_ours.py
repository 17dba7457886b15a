"""Our side of `benchmarks.pipeline`: post-processing in a process of its own.

    python -m benchmarks.pipeline_ours FILE

For each line of standard input, a number of threads (0: OpenCV's default), it post-processes the
candidates in FILE to run lengths and prints what it took, and what of it NMS alone takes.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.candidates import prepare_image, solo_spec
from benchmarks.memory import forget_peak, peak_bytes, resident_bytes
from pipeline.model_config import PostprocessSpec
from pipeline.postprocess import postprocess, select
from pipeline.types import Candidates, Prepared

Case = tuple[Prepared, Candidates, PostprocessSpec]


def load_case(file: Path) -> Case:
    """What `benchmarks.pipeline` wrote."""
    with np.load(file) as data:
        height, width = data["image_hw"].tolist()
        candidates = Candidates(data["scores"], data["labels"], data["mask_probs"])
        return prepare_image((height, width)), candidates, solo_spec(int(data["count"]))


def measure(case: Case) -> dict[str, Any]:
    """One run; seconds of everything and then of NMS alone, on both clocks."""
    prepared, candidates, spec = case
    forget_peak()
    before = resident_bytes()
    laps = [(time.process_time(), time.perf_counter())]
    found = postprocess(prepared, [candidates], spec)
    laps.append((time.process_time(), time.perf_counter()))
    added_bytes = peak_bytes() - before
    select(candidates, spec, least_score=spec.score_threshold)
    laps.append((time.process_time(), time.perf_counter()))
    seconds = np.diff(np.array(laps), axis=0)
    return {
        "cpu_s": dict(zip(("all", "nms"), seconds[:, 0].tolist(), strict=True)),
        "wall_s": dict(zip(("all", "nms"), seconds[:, 1].tolist(), strict=True)),
        "added_bytes": added_bytes,
        "scores": [instance.score for instance in found],
        "labels": [instance.label for instance in found],
        "counts": [instance.rle["counts"].decode() for instance in found],
    }


def main(file: Path) -> None:
    """Entry point."""
    case, default = load_case(file), cv2.getNumThreads()
    for line in sys.stdin:
        cv2.setNumThreads(int(line) or default)
        print(json.dumps(measure(case)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
