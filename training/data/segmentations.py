"""COCO segmentations: polygons, uncompressed or compressed RLE, checked before pycocotools.

pycocotools reads and writes beyond its memory, or runs for minutes, on counts that do not fill
their mask and on coordinates far away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from pipeline.runs import read_counts
from training.data.records import (
    Annotation,
    PolygonObject,
    Polygons,
    build_annotation,
)
from training.data.report import Kind, Problem, shorten

_FARTHEST = 10
"""Coordinates of polygons may be so many times height + width."""
_LONGEST_PX = 4_000_000
"""Outlines of an object may be so long; rasterising takes time and memory for each pixel."""


def read_object(
    segmentation: Any, label: int, area: float | None, image_hw: tuple[int, int]
) -> Annotation | PolygonObject:
    """A segmentation as a validated object.

    Raises:
        Problem: It cannot be used; the message has the value.
    """
    if segmentation is None or segmentation in ([], {}):
        raise Problem(Kind.NO_SEGMENTATION, f"the segmentation is {segmentation}")
    if isinstance(segmentation, list):
        polygons = _read_polygons(segmentation, image_hw)
        if not polygons:
            raise Problem(Kind.FEW_POINTS, f"the polygons are {shorten(segmentation)}")
        _check_extent(polygons, image_hw)
        return PolygonObject(polygons, label, area)
    if isinstance(segmentation, dict):
        rle, pixels = _read_rle(segmentation, image_hw)
        if not pixels:
            raise Problem(Kind.NO_PIXELS, f"the counts are {shorten(segmentation['counts'])}")
        return build_annotation(rle, label, area)
    raise Problem(Kind.SEGMENTATION, f"the segmentation is {shorten(segmentation)}")


def has_short_part(segmentation: Any) -> bool:
    """Whether a polygon of the object has less than three points, so that it is left out."""
    return isinstance(segmentation, list) and any(len(part) < 6 for part in segmentation)


def _read_polygons(parts: list[Any], image_hw: tuple[int, int]) -> Polygons:
    """The polygons with at least three points."""
    polygons = []
    for part in parts:
        if not isinstance(part, list) or len(part) % 2:
            raise _no_polygon(part)
        points = _read_points(part, image_hw)
        if len(points) >= 6:
            polygons.append(points)
    return tuple(polygons)


def _no_polygon(part: Any) -> Problem:
    return Problem(
        Kind.SEGMENTATION, f"a polygon is {shorten(part)}, expected a list [x, y, x, y, ...]"
    )


def _read_points(part: list[Any], image_hw: tuple[int, int]) -> NDArray[np.float64]:
    """The coordinates of a polygon, [2 P]."""
    try:
        points = np.array(part, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise Problem(
            Kind.SEGMENTATION, f"a polygon has a coordinate that is no number: {shorten(part)}"
        ) from error
    if points.ndim != 1:
        raise _no_polygon(part)
    height, width = image_hw
    most = _FARTHEST * (height + width)
    distances = np.abs(points)
    if not distances.max(initial=0) <= most:  # NaN, too
        wrong = np.flatnonzero(~(distances <= most))
        raise Problem(
            Kind.COORDINATE,
            f"a polygon has the coordinate {shorten(part[wrong[0]])}, the image is "
            f"{width}x{height} px",
        )
    return points


def _check_extent(polygons: Polygons, image_hw: tuple[int, int]) -> None:
    """Refuses outlines that are too long, and skips objects without pixels in the image."""
    height, width = image_hw
    points = (polygons[0] if len(polygons) == 1 else np.concatenate(polygons)).reshape(-1, 2)
    left, top = points.min(axis=0).tolist()
    right, bottom = points.max(axis=0).tolist()
    if len(points) * max(right - left, bottom - top) > _LONGEST_PX:  # else it cannot be so long
        length = sum(
            float(np.abs(np.diff(p.reshape(-1, 2), axis=0)).max(axis=1).sum()) for p in polygons
        )
        if length > _LONGEST_PX:
            raise Problem(
                Kind.COORDINATE,
                f"the outline is {length:.0f} px long, more than the {_LONGEST_PX} px allowed",
            )
    if left >= width or top >= height or right <= 0 or bottom <= 0:
        raise Problem(
            Kind.OUTSIDE,
            f"it lies at x {left:g}..{right:g}, y {top:g}..{bottom:g}, the image is "
            f"{width}x{height} px",
        )
    if left == right or top == bottom:
        raise Problem(Kind.NO_PIXELS, f"it lies at x {left:g}..{right:g}, y {top:g}..{bottom:g}")


def _read_rle(
    segmentation: dict[str, Any], image_hw: tuple[int, int]
) -> tuple[dict[str, Any], int]:
    """Compressed RLE and the number of its pixels."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, Sequence) or isinstance(size, str) or tuple(size) != image_hw:
        raise Problem(
            Kind.RLE,
            f"it is a mask of {shorten(size)}, its image is {list(image_hw)} (height, width)",
        )
    pixels = image_hw[0] * image_hw[1]
    if isinstance(counts, (str, bytes, list)) and not counts:
        return {}, 0
    try:
        if isinstance(counts, (str, bytes)):
            lengths = read_counts(counts, pixels)
        else:
            lengths = _read_lengths(counts, pixels)
    except ValueError as error:
        raise Problem(Kind.RLE, str(error)) from error
    plain = {"size": list(image_hw), "counts": _without_gaps(lengths)}
    # pycocotools computes wrong boxes of runs without length
    return dict(coco_mask.frPyObjects(plain, *image_hw)), int(lengths[1::2].sum())


def _read_lengths(counts: Any, pixels: int) -> NDArray[np.int64]:
    """Uncompressed run lengths.

    Raises:
        ValueError: They are no whole numbers, or do not fill the mask.
    """
    wrong = f"the RLE counts are {shorten(counts)}, expected whole numbers that give {pixels}"
    try:
        lengths = np.array(counts, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(wrong) from error
    if lengths.ndim != 1 or not np.all((lengths >= 0) & (lengths <= pixels)):
        raise ValueError(wrong)
    whole = lengths.astype(np.int64)
    if np.any(whole != lengths):
        raise ValueError(wrong)
    if whole.sum() != pixels:
        raise ValueError(f"the RLE counts give {whole.sum()} pixels, the mask has {pixels}")
    return whole


def _without_gaps(lengths: NDArray[np.int64]) -> list[int]:
    """Run lengths without runs of length 0 but the first."""
    inner = lengths[1:]
    if inner.all():
        return lengths.tolist()  # type: ignore[no-any-return]
    merged = [int(lengths[0])]
    ones_last = False
    for place, length in enumerate(inner.tolist(), start=1):
        if not length:
            continue
        if bool(place % 2) == ones_last:
            merged[-1] += length
        else:
            merged.append(length)
            ones_last = not ones_last
    return merged
