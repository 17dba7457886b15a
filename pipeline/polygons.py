"""Outlines of masks along pixel edges: filling them gives the same mask.

Points are pixel corners as x, y in the image, so pixel (row, column) lies between `column` and
`column + 1`.

Symbols: P points of a ring, h w box of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.types import Bool, Int64, UInt8

Ring = Int64
"""[P, 2] corners of a closed outline; the first one is not repeated."""


def trace_outlines(mask: UInt8, origin_xy: tuple[int, int]) -> list[Ring]:
    """The outer outline of each 8-connected part of a mask; holes are left out.

    Args:
        mask: [h, w] uint8 0/1.
        origin_xy: Place of its first pixel in the image.
    """
    return [ring + origin_xy for ring, is_hole in _trace(mask) if not is_hole]


def trace_parts(mask: UInt8, origin_xy: tuple[int, int]) -> list[list[Ring]]:
    """The 4-connected parts of a mask as valid polygons: the outer ring first, then holes.

    No ring touches itself, as OGC's simple features require. Outer rings have a positive area
    (shoelace formula), holes a negative one.

    Args:
        mask: [h, w] uint8 0/1.
        origin_xy: Place of its first pixel in the image.
    """
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    parts = []
    for part in range(1, count):
        left, top, width, height = (int(v) for v in stats[part, :4])
        pixels = (labels[top : top + height, left : left + width] == part).astype(np.uint8)
        rings = sorted(_trace(pixels), key=lambda found: found[1])
        place = origin_xy[0] + left, origin_xy[1] + top
        parts.append([_orient(ring, is_hole) + place for ring, is_hole in rings])
    return parts


def simplify(ring: Ring, tolerance_px: float) -> Ring:
    """A ring with fewer points, none of the dropped ones farther off (Douglas-Peucker).

    A ring that would lose its area stays as it is.
    """
    if tolerance_px <= 0:
        return ring
    reduced = cv2.approxPolyDP(ring.astype(np.float32)[:, None], tolerance_px, closed=True)
    points = reduced.reshape(-1, 2).astype(np.int64)
    return points if len(points) > 2 and _area(points) else ring


def connect(rings: Sequence[Ring]) -> Ring:
    """One ring that encloses the same area as several; it goes from each to the next and back.

    The connections have no width. A hole is a ring like any other, by the even-odd rule.
    """
    there: list[Ring] = []
    back: list[Ring] = []
    entry = rings[0]
    for following in rings[1:]:
        leave = _nearest(entry, following.mean(axis=0))
        enter = _nearest(following, entry[leave])
        there.append(entry[: leave + 1])
        back.append(np.concatenate([entry[leave:], entry[:1]]))
        entry = np.roll(following, -enter, axis=0)
    if not there:
        return entry
    return np.concatenate([*there, entry, entry[:1], *reversed(back)])[:-1]


def _trace(mask: UInt8) -> list[tuple[Ring, bool]]:
    """The rings of a mask [h, w], and whether each is a hole."""
    # In the doubled mask a contour runs along the first and the last row and column of each
    # pixel; (v + 1) // 2 maps these to the pixel's two edges.
    doubled = mask.repeat(2, axis=0).repeat(2, axis=1)
    contours, tree = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    corners = [(contour.reshape(-1, 2).astype(np.int64) + 1) // 2 for contour in contours]
    is_hole = [] if tree is None else tree[0, :, 3] >= 0
    return [
        (_drop_collinear(points), bool(hole)) for points, hole in zip(corners, is_hole, strict=True)
    ]


def _drop_collinear(points: Int64) -> Ring:
    """Drops repeated vertices and those on the line between their neighbours; [P, 2]."""
    points = points[(points != np.roll(points, 1, axis=0)).any(axis=1)]
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    keep: Bool = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    return points[keep]


def _area(ring: Ring) -> int:
    """Twice the signed area of a ring."""
    x, y = ring.T
    return int((x * np.roll(y, -1) - np.roll(x, -1) * y).sum())


def _orient(ring: Ring, is_hole: bool) -> Ring:
    return ring[::-1] if (_area(ring) > 0) == is_hole else ring


def _nearest(ring: Ring, point: NDArray[np.int64] | NDArray[np.float64]) -> int:
    return int(((ring - point) ** 2).sum(axis=1).argmin())
