"""COCO mask AP by pycocotools, with any limit of detections per image."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from training.federated import ignore_unlabelled

AP_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR")
IOU_50, IOU_75 = 0, 5  # positions among the thresholds 0.50, 0.55, ... 0.95


def _mean(values: NDArray[np.float64]) -> float:
    """Mean of the defined entries; -1 if there are none, as in COCO."""
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0


def mask_ap(
    truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    *,
    max_dets: int = 100,
) -> dict[str, float]:
    """The first part of `score_masks`."""
    return score_masks(truth, results, max_dets=max_dets)[0]


def score_masks(
    truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    *,
    max_dets: int = 100,
    image_ids: Collection[int | str] | None = None,
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """AP, AP50, AP75, APs, APm, APl and AR of segmentation results, and AP, AP50 of each class.

    Args:
        truth: COCO ground truth as `CocoDataset.truth` gives it: every field is valid. Images may
            have the fields of LVIS for classes that are not labelled.
        results: COCO result dicts with `image_id`, `category_id`, `score`, `segmentation`.
        max_dets: Detections per image that are evaluated; COCO's value is 100, dense images need
            more.
        image_ids: Evaluate only these images.

    Returns:
        The seven metrics, and two of them by class name; -1 if the ground truth has no such
        object, 0 if there are no results.

    Raises:
        ValueError: A result names an image that the ground truth does not have.
    """
    truth, results = ignore_unlabelled(truth, results)
    numbers = _number_images(truth)
    unknown = next((r["image_id"] for r in results if r["image_id"] not in numbers), None)
    if unknown is not None:
        raise ValueError(f"a result names image {unknown!r}, which the ground truth does not have")
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = {
            "images": [{**i, "id": numbers[i["id"]]} for i in truth["images"]],
            "categories": list(truth["categories"]),
            "annotations": _numbered(truth["annotations"], numbers),
        }
        known.createIndex()
        if results:
            found = known.loadRes(_numbered(results, numbers))
        else:
            found = COCO()
            found.dataset = {**known.dataset, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(known, found, "segm")
        evaluation.params.maxDets = [1, 10, max_dets]
        if image_ids is not None:
            evaluation.params.imgIds = [numbers[i] for i in image_ids]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"]  # [IoU, recall, category, area, maxDets]
    recall = evaluation.eval["recall"]  # [IoU, category, area, maxDets]
    metrics = {
        "AP": _mean(precision[:, :, :, 0, -1]),
        "AP50": _mean(precision[IOU_50, :, :, 0, -1]),
        "AP75": _mean(precision[IOU_75, :, :, 0, -1]),
        "APs": _mean(precision[:, :, :, 1, -1]),
        "APm": _mean(precision[:, :, :, 2, -1]),
        "APl": _mean(precision[:, :, :, 3, -1]),
        "AR": _mean(recall[:, :, 0, -1]),
    }
    names = {category["id"]: str(category["name"]) for category in truth["categories"]}
    classes = {
        names[category_id]: {
            "AP": _mean(precision[:, :, place, 0, -1]),
            "AP50": _mean(precision[IOU_50, :, place, 0, -1]),
        }
        for place, category_id in enumerate(evaluation.params.catIds)
    }
    return metrics, classes


def describe_metrics(metrics: Mapping[str, float]) -> str:
    """One line, as "AP 0.4853 APl -"; "-" for what the ground truth has no object for."""
    return " ".join(f"{k} {v:.4f}" if v >= 0 else f"{k} -" for k, v in metrics.items())


def _number_images(truth: Mapping[str, Any]) -> dict[int | str, int]:
    """A number for each image id, in the order of the ids; pycocotools takes no text for an id."""
    ids = sorted((i["id"] for i in truth["images"]), key=lambda i: (isinstance(i, str), i))
    return {image_id: number for number, image_id in enumerate(ids)}


def _numbered(
    entries: Sequence[Mapping[str, Any]], numbers: Mapping[int | str, int]
) -> list[dict[str, Any]]:
    """Copies, because pycocotools changes them, with the numbers of their images."""
    return [{**entry, "image_id": numbers[entry["image_id"]]} for entry in entries]
