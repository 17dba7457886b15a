"""Instances and objects of an image, matched one to one.

Symbols: N instances, M objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

Entry = Mapping[str, Any]
Float64 = NDArray[np.float64]


def rank(results: Sequence[Entry]) -> list[Entry]:
    """COCO results, best first; those of equal scores keep their order."""
    return sorted(results, key=lambda result: -float(result["score"]))


def measure_iou(
    found: Sequence[Entry], objects: Sequence[Entry], *, crowd: bool = False
) -> Float64:
    """IoU of masks; 0 between different classes.

    Args:
        found: N COCO results with RLE.
        objects: M COCO annotations with RLE.
        crowd: Gives the share of the instance that the object covers instead.

    Returns:
        [N, M].
    """
    if not found or not objects:
        return np.zeros((len(found), len(objects)))
    masks = [[dict(entry["segmentation"]) for entry in entries] for entries in (found, objects)]
    iou = np.asarray(coco_mask.iou(masks[0], masks[1], [crowd] * len(objects)), np.float64)
    classes = ([entry["category_id"] for entry in entries] for entries in (found, objects))
    iou[np.not_equal.outer(*classes)] = 0
    return iou


def match(iou: Float64, threshold: float) -> list[int | None]:
    """The object of each instance: of those that no earlier instance has, the one of largest IoU.

    Args:
        iou: [N, M], instances best first.
        threshold: Least IoU of a match, above 0.
    """
    free = iou.copy()
    found: list[int | None] = []
    for row in free:
        best = int(row.argmax()) if row.size else -1
        if best < 0 or row[best] < threshold:
            found.append(None)
            continue
        found.append(best)
        free[:, best] = -1
    return found
