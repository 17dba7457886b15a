"""Error analysis: results with ground-truth masks (later versions of the paper, not version 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from training.data.coco import CocoDataset
from training.data.records import Annotation


def with_ground_truth_masks(
    results: Sequence[dict[str, Any]], data: CocoDataset
) -> list[dict[str, Any]]:
    """Replaces each predicted mask by the ground-truth mask of the largest IoU.

    Category and score are kept, so the remaining error is that of detection and classification.

    Args:
        results: COCO results with RLE.
        data: The split of the results.

    Returns:
        New results in the same order; a mask without any overlap is kept.

    Raises:
        ValueError: The image of a result is not in the split.
    """
    objects = {record.image_id: record.annotations for record in data.records}
    for result in results:
        if result["image_id"] not in objects:
            raise ValueError(f"image {result['image_id']} is not in {data.annotation_file}")
    by_image: dict[int, list[int]] = {}
    for index, result in enumerate(results):
        by_image.setdefault(result["image_id"], []).append(index)
    replaced = list(results)
    for image_id, indices in by_image.items():
        found = _best_masks([results[i]["segmentation"] for i in indices], objects[image_id])
        for index, segmentation in zip(indices, found, strict=True):
            replaced[index] = {**results[index], "segmentation": segmentation}
    return replaced


def _best_masks(
    predicted: Sequence[dict[str, Any]], objects: Sequence[Annotation]
) -> list[dict[str, Any]]:
    """The ground-truth mask of the largest IoU for each predicted mask, as RLE for JSON."""
    if not objects:
        return list(predicted)
    truths = [annotation.rle for annotation in objects]
    ious = np.asarray(coco_mask.iou(list(predicted), truths, [0] * len(truths)))
    best = []
    for segmentation, row in zip(predicted, ious, strict=True):
        rle = truths[int(row.argmax())]
        text = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
        best.append(text if row.max() > 0 else segmentation)
    return best
