"""Shape of masks, with the names and definitions of scikit-image's `regionprops_table`.

Symbols: R rows of a mask, E edges of its convex hull.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from pipeline.encode import decode_box
from pipeline.types import Detection, Int64, UInt8

COLUMNS = (
    *("area", "bbox-0", "bbox-1", "bbox-2", "bbox-3", "centroid-0", "centroid-1"),
    *("equivalent_diameter_area", "axis_major_length", "axis_minor_length"),
    *("eccentricity", "orientation", "solidity"),
)
"""What `measure_shape` returns; index 0 is the row, 1 the column; lengths in px."""


def measure_shape(instance: Detection) -> dict[str, float]:
    """Size, place and shape of an instance's mask, in the order of `COLUMNS`."""
    x, y, width, height = instance.bbox_xywh
    mask = decode_box(instance)
    area = int(mask.sum())
    (row, column), (rr, rc, cc) = _moments(mask, area)
    spread = math.hypot(rr - cc, 2 * rc)
    major, minor = (rr + cc + spread) / 2, max(0.0, (rr + cc - spread) / 2)
    values = (
        *(area, y, x, y + height, x + width, y + row, x + column),
        math.sqrt(4 * area / math.pi),
        *(4 * math.sqrt(major), 4 * math.sqrt(minor)),
        math.sqrt(1 - minor / major) if major else 0.0,
        _orient(rr, rc, cc),
        area / _count_hull(mask),
    )
    return dict(zip(COLUMNS, values, strict=True))


def _moments(mask: UInt8, area: int) -> tuple[tuple[float, float], tuple[float, float, float]]:
    """Centroid (row, column) in the box, and the variances of row, both, column."""
    in_row = mask.sum(axis=1, dtype=np.int64)
    in_column = mask.sum(axis=0, dtype=np.int64)
    rows, columns = np.arange(mask.shape[0]), np.arange(mask.shape[1])
    row, column = float(rows @ in_row) / area, float(columns @ in_column) / area
    rr = float((rows - row) ** 2 @ in_row) / area
    rc = float((mask @ (columns - column)) @ (rows - row)) / area
    cc = float((columns - column) ** 2 @ in_column) / area
    return (row, column), (rr, rc, cc)


def _orient(rr: float, rc: float, cc: float) -> float:
    """Angle between the rows' direction and the major axis, -pi/2 to pi/2, counter-clockwise."""
    if rr == cc:
        return math.pi / 4 if rc > 0 else -math.pi / 4
    return 0.5 * math.atan2(2 * rc, rr - cc)


def _count_hull(mask: UInt8) -> int:
    """Pixels whose centres lie in the convex hull of the midpoints of the mask's pixel edges."""
    filled = np.flatnonzero(mask.any(axis=1))
    first = mask[filled].argmax(axis=1).astype(np.int64)
    last = mask.shape[1] - 1 - mask[filled][:, ::-1].argmax(axis=1).astype(np.int64)
    # In halves of pixels, relative to the centre of the first pixel.
    points = [
        np.stack([2 * columns + dx, 2 * filled + dy], axis=1)
        for columns in (first, last)
        for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1))
    ]
    hull = cv2.convexHull(np.concatenate(points).astype(np.int32)).reshape(-1, 2).astype(np.int64)
    return _count_inside(hull, 2 * np.arange(filled[0], filled[-1] + 1))


def _count_inside(hull: Int64, rows: Int64) -> int:
    """Pixels [even x, y in `rows`] in a convex polygon of integers or on its border."""
    x, y = hull.T
    dx, dy = np.roll(x, -1) - x, np.roll(y, -1) - y
    if (x * (y + dy) - (x + dx) * y).sum() < 0:  # the sides of an edge follow its direction
        dx, dy = -dx, -dy
        x, y = x - dx, y - dy
    # On the line of an edge, 2 column * dy = x * dy + dx * (row - y).
    ends = x * dy + dx * (rows[:, None] - y)
    down, up = dy > 0, dy < 0
    highest = (ends[:, down] // (2 * dy[down])).min(axis=1)
    lowest = -(-ends[:, up] // (2 * dy[up])).min(axis=1)
    return int(np.maximum(highest - lowest + 1, 0).sum())
