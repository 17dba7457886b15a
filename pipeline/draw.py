"""Overlays of instances on their image."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np

from pipeline.encode import decode_box
from pipeline.model_config import Task
from pipeline.types import Detection, UInt8

GOLDEN_RATIO = 0.618033988749895
FILL_ALPHA = 0.4
PX_PER_OUTLINE_PX = 600
"""The outline gets one pixel wider for every this many px of the image's short side."""


def instance_colour(index: int) -> tuple[int, int, int]:
    """A bright RGB colour, 0..255; consecutive indices get distant hues."""
    hue = (index * GOLDEN_RATIO) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85 if index % 2 else 0.6, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_instances(
    image: UInt8, instances: Sequence[Detection], task: Task = "segmentation"
) -> UInt8:
    """Draws each mask with a translucent fill and an opaque outline.

    Args:
        image: [H, W, 3] uint8 RGB; not modified.
        instances: Best first; drawn in reverse order, so that better ones are on top.
        task: `contour` masks are drawn opaque, without fill and outline.

    Returns:
        [H, W, 3] uint8 RGB.
    """
    canvas = image.copy()
    thickness = 1 + min(image.shape[:2]) // PX_PER_OUTLINE_PX
    for index in range(len(instances) - 1, -1, -1):
        x, y, width, height = instances[index].bbox_xywh
        mask = decode_box(instances[index])
        part = canvas[y : y + height, x : x + width]
        colour = np.array(instance_colour(index), np.float32)
        if task == "contour":
            part[mask > 0] = colour.astype(np.uint8)
            continue
        levels = np.arange(256, dtype=np.float32)[:, None, None]
        blended = levels * (1 - FILL_ALPHA) + colour * FILL_ALPHA
        filled = cv2.LUT(part, blended.astype(np.uint8))
        cv2.copyTo(filled, mask, part)
        contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        outline = np.zeros_like(mask)
        cv2.drawContours(outline, contours, -1, 1, 2 * thickness - 1)
        part[(mask & outline) > 0] = colour.astype(np.uint8)
    return canvas
