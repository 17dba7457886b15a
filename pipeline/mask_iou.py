"""IoU of the masks of COCO instances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

Entry = Mapping[str, Any]
Float64 = NDArray[np.float64]


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
