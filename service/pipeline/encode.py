"""Instances on the wire: COCO results with RLE or polygons."""

from __future__ import annotations

from typing import Any, Literal

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from service.pipeline.model_config import ModelConfig
from service.pipeline.types import Instance, UInt8

SCORE_DIGITS = 6


def decode_box(instance: Instance) -> UInt8:
    """The mask's pixels inside its box: [h, w] uint8 0/1."""
    x, y, width, height = instance.bbox_xywh
    full = coco_mask.decode(instance.rle)
    return np.ascontiguousarray(full[y : y + height, x : x + width])


def encode_polygons(instance: Instance) -> list[list[float]]:
    """Outer contours as COCO polygons, one flat [x0, y0, x1, y1, ...] per part.

    COCO polygons cannot say holes, so these are filled; RLE is exact. Vertices lie on pixel
    centres, and a part of one or two pixels repeats its last vertex to have the three that a
    COCO polygon needs.
    """
    x, y, _, _ = instance.bbox_xywh
    contours, _ = cv2.findContours(
        decode_box(instance), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE, offset=(x, y)
    )
    polygons = []
    for contour in contours:
        points = contour.reshape(-1, 2)
        if len(points) < 3:
            points = np.concatenate([points, np.repeat(points[-1:], 3 - len(points), axis=0)])
        polygons.append([float(v) for v in points.reshape(-1)])
    return polygons


def encode_rle(instance: Instance) -> dict[str, Any]:
    """COCO compressed RLE with its counts as text."""
    return {"size": list(instance.rle["size"]), "counts": instance.rle["counts"].decode("ascii")}


def instance_to_coco(
    instance: Instance, config: ModelConfig, *, masks: Literal["rle", "polygon", "none"] = "rle"
) -> dict[str, Any]:
    """An instance as a COCO result without its image_id.

    Args:
        instance: What was found.
        config: The model's classes.
        masks: How `segmentation` is written; `none` leaves it out.
    """
    category = config.classes[instance.label]
    result: dict[str, Any] = {
        "category_id": category.category_id,
        "category": category.name,
        "score": round(instance.score, SCORE_DIGITS),
        "bbox": list(instance.bbox_xywh),
        "area": instance.area,
    }
    if masks == "rle":
        result["segmentation"] = encode_rle(instance)
    elif masks == "polygon":
        result["segmentation"] = encode_polygons(instance)
    return result
