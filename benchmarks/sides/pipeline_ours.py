"""Our side of `benchmarks pipeline`: python -m benchmarks.sides.pipeline_ours FILE.

A line is a number of threads (0: OpenCV's default). It post-processes the candidates in FILE to run
lengths, and then runs NMS alone once more.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.candidates import prepare_image, solo_spec
from benchmarks.harness.memory import read_status, reset_peak
from benchmarks.harness.rounds import StageClock, answer_lines
from pipeline.postprocess import postprocess, select
from pipeline.types import Candidates


def main(file: Path) -> None:
    """Entry point."""
    with np.load(file) as data:
        height, width = data["image_hw"].tolist()
        candidates = Candidates(data["scores"], data["labels"], data["mask_probs"])
        prepared, spec = prepare_image((height, width)), solo_spec(int(data["count"]))
    default = cv2.getNumThreads()

    def answer(line: str) -> dict[str, Any]:
        cv2.setNumThreads(int(line) or default)
        reset_peak()
        before = read_status("VmRSS")
        clock = StageClock()
        found = postprocess(prepared, [candidates], spec).instances
        clock.lap("all")
        added_bytes = read_status("VmHWM") - before
        select(candidates, spec, least_score=spec.score_threshold)
        clock.lap("nms")
        return {
            **clock.costs,
            "added_bytes": added_bytes,
            "scores": [instance.score for instance in found],
            "labels": [instance.label for instance in found],
            "counts": [instance.rle["counts"].decode() for instance in found],
        }

    answer_lines(answer)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
