"""How much of the error is the masks' (paper, section 3.5): results with ground-truth masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from training.data.coco import Annotation, CocoDataset


def with_ground_truth_masks(
    results: Sequence[dict[str, Any]], data: CocoDataset
) -> list[dict[str, Any]]:
    """Replaces each predicted mask by the ground-truth mask that it overlaps most.

    Category and score stay, so what is left of the error is detection and classification.

    Args:
        results: COCO results with RLE.
        data: The split that they belong to.

    Returns:
        New results in the same order; a mask without any overlap stays as it is.

    Raises:
        ValueError: A result names an image that the split does not have.
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
    """The object of largest IoU for each predicted mask, as JSON-ready RLE."""
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
