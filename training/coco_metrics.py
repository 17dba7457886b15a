"""COCO mask AP by pycocotools, with any limit of detections per image."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

IOU_50, IOU_75 = 0, 5  # positions among the thresholds 0.50, 0.55, ... 0.95


def _mean(values: NDArray[np.float64]) -> float:
    """Mean of the defined entries; -1 if there are none, as in COCO."""
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0


def mask_ap(
    annotation_file: Path,
    results: Sequence[dict[str, Any]],
    *,
    max_dets: int = 100,
    image_ids: Sequence[int] | None = None,
) -> dict[str, float]:
    """AP, AP50, AP75, APs, APm, APl and AR of segmentation results.

    Args:
        annotation_file: COCO ground truth.
        results: COCO result dicts with `image_id`, `category_id`, `score`, `segmentation`.
        max_dets: Detections per image that are evaluated; COCO's value is 100, dense images need
            more.
        image_ids: Evaluate only these images.

    Returns:
        The seven metrics; -1 if the ground truth has no such object, 0 if there are no results.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotation_file))
        if results:
            found = truth.loadRes([dict(r) for r in results])  # loadRes changes them
        else:
            found = COCO()
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(truth, found, "segm")
        evaluation.params.maxDets = [1, 10, max_dets]
        if image_ids is not None:
            evaluation.params.imgIds = list(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"]  # [IoU, recall, category, area, maxDets]
    recall = evaluation.eval["recall"]  # [IoU, category, area, maxDets]
    return {
        "AP": _mean(precision[:, :, :, 0, -1]),
        "AP50": _mean(precision[IOU_50, :, :, 0, -1]),
        "AP75": _mean(precision[IOU_75, :, :, 0, -1]),
        "APs": _mean(precision[:, :, :, 1, -1]),
        "APm": _mean(precision[:, :, :, 2, -1]),
        "APl": _mean(precision[:, :, :, 3, -1]),
        "AR": _mean(recall[:, :, 0, -1]),
    }
