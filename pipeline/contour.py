"""Detection contours: thin curves around objects, and the regions they enclose.

The paper's instance contour detection (section 6): a mask is the object's outline instead of its
area. Two thin curves around one object share few pixels, so NMS, tile merging and average
precision compare the enclosed regions.

Symbols: N masks, H W image, h w box or mask plane.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from pipeline.encode import decode_box
from pipeline.runs import BoxMask, build_instance
from pipeline.types import Bool, Detection, UInt8

CLOSING = np.ones((3, 3), np.uint8)
"""Kernel of the morphological closing before a fill; closes gaps of up to two pixels."""


def draw_contour(mask: UInt8) -> UInt8:
    """The outline of a mask, one pixel wide, as found by OpenCV's findContours.

    The curve consists of the mask's border pixels, including those of holes. Everything outside
    the array is background, so an object truncated at the array's edge has an outline along that
    edge.

    Args:
        mask: [h, w] uint8 0/1.

    Returns:
        [h, w] uint8 0/1, a subset of the mask; all zero only if the mask is.
    """
    contours, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    outline = np.zeros(mask.shape, np.uint8)  # OpenCV needs C order, whatever the mask has
    cv2.drawContours(outline, contours, -1, 1, 1)
    return outline


def _close(curve: UInt8) -> UInt8:
    """Closes small gaps; the result is a superset of the curve."""
    padded = cv2.copyMakeBorder(curve, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, CLOSING)
    return np.ascontiguousarray(closed[1:-1, 1:-1], np.uint8)


def _fill(closed: UInt8) -> UInt8:
    """Fills the outer border of each connected component."""
    contours, _ = cv2.findContours(closed, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.zeros(closed.shape, np.uint8)
    cv2.drawContours(filled, contours, -1, 1, cv2.FILLED)
    return filled


def fill_contour(curve: UInt8) -> UInt8:
    """The region enclosed by a curve, including the curve; an open curve is returned as it is.

    Args:
        curve: [h, w] uint8 0/1.

    Returns:
        [h, w] uint8 0/1, with the same bounding box.
    """
    return _fill(_close(curve))


def fill_contours(curves: Bool) -> Bool:
    """`fill_contour` of every mask: [N, h, w] bool -> [N, h, w] bool."""
    filled = curves.copy()
    for plane in filled.view(np.uint8):
        x, y, width, height = cv2.boundingRect(plane)
        if width:
            part = plane[y : y + height, x : x + width]
            part[:] = fill_contour(np.ascontiguousarray(part))
    return filled


def fill_instance(instance: Detection) -> Detection:
    """Replaces an instance's curve by the enclosed region; class, score and box are kept."""
    x, y, _, _ = instance.bbox_xywh
    filled = fill_contour(decode_box(instance)).astype(np.bool_)
    height, width = instance.rle["size"]
    return build_instance(BoxMask(y, x, filled), (height, width), instance.label, instance.score)


def join_contours(parts: Sequence[Detection]) -> Detection:
    """Merges curves into the outline of the union of their regions, with the highest score.

    Curve pixels strictly inside another curve are removed, so parts of an object from adjacent
    tiles lose their outlines along the tile borders.

    Args:
        parts: One or more instances of one image.
    """
    best = max(parts, key=lambda instance: instance.score)
    if len(parts) == 1:
        return best
    boxes = np.array([part.bbox_xywh for part in parts])
    left, top = (int(v) for v in boxes[:, :2].min(axis=0))
    right, bottom = (int(v) for v in (boxes[:, :2] + boxes[:, 2:]).max(axis=0))
    curves = np.zeros((bottom - top, right - left), np.uint8)
    inside = np.zeros_like(curves)
    for part in parts:
        x, y, width, height = part.bbox_xywh
        here = np.s_[y - top : y - top + height, x - left : x - left + width]
        curve = decode_box(part)
        closed = _close(curve)
        curves[here] |= curve
        inside[here] |= _fill(closed) & ~closed
    # Never empty: the leftmost curve pixel is not strictly inside any curve.
    outline = curves & ~inside
    x, y, width, height = cv2.boundingRect(outline)
    pixels = outline[y : y + height, x : x + width].astype(np.bool_)
    image_h, image_w = best.rle["size"]
    box = BoxMask(top + y, left + x, pixels)
    return build_instance(box, (image_h, image_w), best.label, best.score)
