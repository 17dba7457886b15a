"""COCO RLE from a mask's pixels inside a box, or from the edges of its runs.

An edge is a column-major pixel index where the mask's value changes: alternately the start of a
run of mask pixels and its exclusive end.

Symbols: H W image, M masks, E edges of all masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from pipeline.types import Bool, Detection, Int64

_MOST_CHARACTERS = 8
"""Of a number of an RLE: it has 40 bits and a sign."""
LONG_PIXELS = 1 << 32
"""An image of so many pixels has runs that pycocotools cannot count; it reads them as others."""
MAX_MASK_PIXELS = 1 << 38
"""The most that `write_counts` and `read_counts` can count."""


def is_long(height: int, width: int) -> bool:
    """Whether run lengths of an image may not fit pycocotools."""
    return height * width >= LONG_PIXELS


def read_counts(counts: str | bytes, pixels: int) -> Int64:
    """The run lengths of a compressed RLE, alternately of zeros and ones.

    pycocotools reads and writes beyond its memory where they do not fill the mask.

    Args:
        counts: As COCO writes them, 5 bits in a character.
        pixels: Of the mask; the lengths add up to it.

    Raises:
        ValueError: They are malformed, or do not fill the mask.
    """
    text = counts.encode("utf-8", "replace") if isinstance(counts, str) else counts
    characters = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if characters.size == 0 or characters.min() < 0 or characters.max() > 63:
        raise ValueError(f"the RLE counts are empty or have characters beyond 0..o: {text[:20]!r}")
    ends = np.flatnonzero(characters & 32 == 0)
    starts = np.append(0, ends[:-1] + 1)
    places = np.arange(characters.size) - np.repeat(starts, np.diff(starts, append=len(text)))
    if characters[-1] & 32 or places.max() >= _MOST_CHARACTERS:
        raise ValueError(f"the RLE counts are cut, or have a number too large: {text[-20:]!r}")
    values = np.add.reduceat((characters & 31) << (5 * places), starts)
    values -= ((characters[ends] & 16) << 1) << (5 * places[ends])  # the sign
    for first in (1, 2):  # each is the difference from the one before the last
        values[first::2] = np.cumsum(values[first::2])
    if values.min() < 0 or values.sum() != pixels:
        raise ValueError(f"the RLE counts give {values.sum()} pixels, the mask has {pixels}")
    return values


def write_counts(counts: Int64) -> bytes:
    """What `read_counts` reads, byte for byte as pycocotools writes it, of any length."""
    values = counts.copy()
    values[3:] -= counts[1:-2]
    bits = np.frexp(np.where(values < 0, ~values, values).astype(np.float64))[1] + 1
    groups = np.maximum((bits + 4) // 5, 1)
    ends = np.cumsum(groups)
    places = np.arange(ends[-1]) - np.repeat(ends - groups, groups)
    characters = (np.repeat(values, groups) >> (5 * places)) & 31
    characters |= np.where(places < np.repeat(groups, groups) - 1, 32, 0)
    text: bytes = (characters + 48).astype(np.uint8).tobytes()
    return text


@dataclass(frozen=True)
class BoxMask:
    """A mask cropped to its box: pixels [bh, bw], top-left corner y, x in the image."""

    y: int
    x: int
    pixels: Bool


class EncodedMask(NamedTuple):
    """A mask of the full image as RLE.

    Attributes:
        rle: COCO compressed RLE, {"size": [H, W], "counts": bytes}.
        bbox_xywh: Bounding box, px.
        area: Number of mask pixels.
    """

    rle: dict[str, Any]
    bbox_xywh: tuple[int, int, int, int]
    area: int


def encode_edges(
    edges: Int64, splits: Int64, image_hw: tuple[int, int]
) -> list[EncodedMask | None]:
    """Encodes many masks at once, byte for byte as pycocotools encodes the full-size masks.

    Args:
        edges: [E] ascending within each mask; no run spans two columns, so a run may end where
            the next one starts.
        splits: [M + 1] bounds of each mask's edges in `edges`.
        image_hw: Height and width of the image.

    Returns:
        One entry per mask; None if it has no edges.
    """
    height, width = image_hw
    encoded: list[EncodedMask | None] = [None] * (len(splits) - 1)
    filled = np.flatnonzero(splits[1:] > splits[:-1])
    if filled.size == 0:
        return encoded
    splits = np.append(splits[filled], splits[-1])
    boxes, areas = _measure(edges, splits, height)
    counts, bounds = _count(*_join_runs(edges, splits), height * width)
    size = [height, width]
    runs = [counts[a:b] for a, b in bounds.tolist()]
    if is_long(height, width):
        rles = [{"counts": write_counts(r)} for r in runs]
    else:
        rles = coco_mask.frPyObjects([{"size": size, "counts": r} for r in runs], height, width)
    for place, rle, box, area in zip(filled, rles, boxes.tolist(), areas.tolist(), strict=True):
        encoded[place] = EncodedMask(
            {"size": list(size), "counts": rle["counts"]}, tuple(box), area
        )
    return encoded


def _measure(edges: Int64, splits: Int64, height: int) -> tuple[Int64, Int64]:
    """Boxes [M, 4] as x, y, width, height and areas [M] of non-empty masks."""
    starts, last = edges[0::2], edges[1::2] - 1
    first_run = splits[:-1] // 2
    top = np.minimum.reduceat(starts % height, first_run)
    bottom = np.maximum.reduceat(last % height, first_run)
    left, right = edges[splits[:-1]] // height, (edges[splits[1:] - 1] - 1) // height
    boxes = np.stack([left, top, right - left + 1, bottom - top + 1], axis=1)
    return boxes, np.add.reduceat(last - starts + 1, first_run)


def _join_runs(edges: Int64, splits: Int64) -> tuple[Int64, Int64]:
    """Joins runs of a mask that are contiguous across the end of a column."""
    touching = edges[1:] == edges[:-1]
    touching[splits[1:-1] - 1] = False  # the next mask may start where this one ends
    if not touching.any():
        return edges, splits
    kept = np.ones(len(edges), np.bool_)
    kept[1:] &= ~touching
    kept[:-1] &= ~touching
    return edges[kept], np.append(0, np.cumsum(kept))[splits]


def _count(edges: Int64, splits: Int64, pixels: int) -> tuple[Int64, Int64]:
    """Run lengths of all masks, alternately of zeros and ones, and each mask's bounds [M, 2]."""
    closed = np.insert(edges, splits[1:], pixels)
    starts = splits[:-1] + np.arange(len(splits) - 1)
    stops = splits[1:] + np.arange(1, len(splits))
    counts = np.diff(closed, prepend=0)
    counts[starts] = closed[starts]
    return counts, np.stack([starts, stops - (counts[stops - 1] == 0)], axis=1)


def _encode_box(mask: BoxMask, image_hw: tuple[int, int]) -> EncodedMask:
    height, _ = image_hw
    box_h, box_w = mask.pixels.shape
    # Column-major, with one zero after each column and one at the front, so that changes of value
    # are alternately starts and ends of runs.
    padded = np.zeros(box_w * (box_h + 1) + 1, np.bool_)
    padded[1:].reshape(box_w, box_h + 1)[:, :box_h] = mask.pixels.T
    column, row = np.divmod(np.flatnonzero(padded[1:] != padded[:-1]), box_h + 1)
    edges = (mask.x + column) * height + mask.y + row
    (encoded,) = encode_edges(edges, np.array([0, len(edges)]), image_hw)
    if encoded is None:
        raise ValueError(f"the mask of {box_h}x{box_w} px at y {mask.y}, x {mask.x} is empty")
    return encoded


def encode_box_mask(mask: BoxMask, image_hw: tuple[int, int]) -> dict[str, Any]:
    """COCO compressed RLE in an image of [H, W], without building the full-size mask.

    Raises:
        ValueError: The mask has no pixels.
    """
    return _encode_box(mask, image_hw).rle


def build_instance(mask: BoxMask, image_hw: tuple[int, int], label: int, score: float) -> Detection:
    """An instance with the tight bounding box of the mask's pixels.

    Raises:
        ValueError: The mask has no pixels.
    """
    return Detection(label, score, *_encode_box(mask, image_hw))
