"""The side of mmdetection 3.3 in `benchmarks pipeline`; runs in mmdetection's interpreter.

    python -m benchmarks.sides.pipeline_mmdet FILE

A line is a number of threads (0: torch's default). It post-processes the candidates in FILE as
`SOLOHead._predict_by_feat_single` does from its Matrix NMS on, and encodes the masks as
`CocoMetric` does. What that function does before (score threshold, area filter, maskness) is inside
our graphs and not timed.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness.memory import read_status, reset_peak
from benchmarks.harness.rounds import StageClock, answer_lines
from benchmarks.sides.training_mmdet import stub_operators

THRESHOLD = 0.5
STRIDE = 4


class PostprocessCase:
    """Candidates of an image and its sizes."""

    def __init__(self, file: Path) -> None:
        with np.load(file) as data:
            self.probs = torch.from_numpy(data["mask_probs"])
            self.scores = torch.from_numpy(data["scores"])
            self.labels = torch.from_numpy(data["labels"])
            self.valid_hw: list[int] = data["valid_hw"].tolist()
            self.image_hw: list[int] = data["image_hw"].tolist()
            self.count = int(data["count"])


def select(case: PostprocessCase, matrix_nms: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, labels and indices after Matrix NMS, with the published settings."""
    masks = case.probs > THRESHOLD
    scores, labels, _, kept = matrix_nms(
        masks,
        case.labels,
        case.scores,
        mask_area=masks.sum((1, 2)).float(),
        nms_pre=500,
        max_num=case.count,
        kernel="gaussian",
        sigma=2.0,
        filter_thr=0.05,
    )
    return scores, labels, kept


def paste(case: PostprocessCase, kept: Tensor) -> Tensor:
    """Binary masks of the original image: [N, H, W]."""
    probs = case.probs[kept]
    canvas_hw = (probs.shape[1] * STRIDE, probs.shape[2] * STRIDE)
    height, width = case.valid_hw
    probs = functional.interpolate(probs.unsqueeze(0), size=canvas_hw, mode="bilinear")
    probs = probs[:, :, :height, :width]
    probs = functional.interpolate(probs, size=case.image_hw, mode="bilinear").squeeze(0)
    return probs > THRESHOLD


def measure(case: PostprocessCase, layers: Any, masks: Any) -> dict[str, Any]:
    """One run; seconds of each stage."""
    reset_peak()
    before = read_status("VmRSS")
    clock = StageClock()
    scores, labels, kept = select(case, layers.mask_matrix_nms)
    clock.lap("nms")
    pasted = paste(case, kept)
    clock.lap("paste")
    rles = masks.encode_mask_results(pasted.numpy())
    clock.lap("encode")
    return {
        **clock.costs,
        "added_bytes": read_status("VmHWM") - before,
        "scores": scores.tolist(),
        "labels": labels.tolist(),
        "counts": [rle["counts"].decode() for rle in rles],
    }


def main(file: Path) -> None:
    """Entry point."""
    stub_operators()
    layers, masks = import_module("mmdet.models.layers"), import_module("mmdet.structures.mask")
    case, default = PostprocessCase(file), torch.get_num_threads()

    def answer(line: str) -> dict[str, Any]:
        torch.set_num_threads(int(line) or default)
        return measure(case, layers, masks)

    answer_lines(answer)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
