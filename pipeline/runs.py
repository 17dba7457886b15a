"""COCO run lengths of masks, from their pixels inside a box or from the edges of their runs.

An edge is a place of the image, in column-major order, whose pixel differs from the one before: in
turn the start of a run of the mask's pixels and what comes after its end.

Symbols: H W image, M masks, E edges of all masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from pipeline.types import Bool, Instance, Int64


@dataclass(frozen=True)
class BoxMask:
    """A mask inside its box: pixels [bh, bw], top-left corner y, x in the image."""

    y: int
    x: int
    pixels: Bool


class Outline(NamedTuple):
    """A mask of the image as run lengths.

    Attributes:
        rle: COCO compressed RLE, {"size": [H, W], "counts": bytes}.
        bbox_xywh: Box of the mask, px.
        area: Mask pixels.
    """

    rle: dict[str, Any]
    bbox_xywh: tuple[int, int, int, int]
    area: int


def encode_edges(edges: Int64, splits: Int64, image_hw: tuple[int, int]) -> list[Outline | None]:
    """Edges to run lengths, many masks at once.

    Equal, byte for byte, to pycocotools' encoding of the full-size masks.

    Args:
        edges: [E] ascending within each mask; each run lies within one column, so that one run
            may end where the next one starts.
        splits: [M + 1] where the masks' edges begin and end.
        image_hw: Height and width of the image.

    Returns:
        One entry a mask; None if it has no edges.
    """
    height, width = image_hw
    outlines: list[Outline | None] = [None] * (len(splits) - 1)
    filled = np.flatnonzero(splits[1:] > splits[:-1])
    if filled.size == 0:
        return outlines
    splits = np.append(splits[filled], splits[-1])
    boxes, areas = _measure(edges, splits, height)
    counts, bounds = _count(*_join_runs(edges, splits), height * width)
    size = [height, width]
    rles = coco_mask.frPyObjects(
        [{"size": size, "counts": counts[a:b]} for a, b in bounds.tolist()], height, width
    )
    for place, rle, box, area in zip(filled, rles, boxes.tolist(), areas.tolist(), strict=True):
        outlines[place] = Outline({"size": list(size), "counts": rle["counts"]}, tuple(box), area)
    return outlines


def _measure(edges: Int64, splits: Int64, height: int) -> tuple[Int64, Int64]:
    """Boxes [M, 4] as x, y, width, height and areas [M] of masks that are not empty."""
    starts, last = edges[0::2], edges[1::2] - 1
    first_run = splits[:-1] // 2
    top = np.minimum.reduceat(starts % height, first_run)
    bottom = np.maximum.reduceat(last % height, first_run)
    left, right = edges[splits[:-1]] // height, (edges[splits[1:] - 1] - 1) // height
    boxes = np.stack([left, top, right - left + 1, bottom - top + 1], axis=1)
    return boxes, np.add.reduceat(last - starts + 1, first_run)


def _join_runs(edges: Int64, splits: Int64) -> tuple[Int64, Int64]:
    """Runs of one mask that touch across a column's border are one run."""
    touching = edges[1:] == edges[:-1]
    touching[splits[1:-1] - 1] = False  # the next mask may begin where this one ends
    if not touching.any():
        return edges, splits
    kept = np.ones(len(edges), np.bool_)
    kept[1:] &= ~touching
    kept[:-1] &= ~touching
    return edges[kept], np.append(0, np.cumsum(kept))[splits]


def _count(edges: Int64, splits: Int64, pixels: int) -> tuple[Int64, Int64]:
    """Run lengths of all masks, in turn unset and set, and where each mask's are: [M, 2]."""
    closed = np.insert(edges, splits[1:], pixels)
    starts = splits[:-1] + np.arange(len(splits) - 1)
    stops = splits[1:] + np.arange(1, len(splits))
    counts = np.diff(closed, prepend=0)
    counts[starts] = closed[starts]
    return counts, np.stack([starts, stops - (counts[stops - 1] == 0)], axis=1)


def _outline_box(mask: BoxMask, image_hw: tuple[int, int]) -> Outline:
    height, _ = image_hw
    box_h, box_w = mask.pixels.shape
    # Column-major with one empty pixel below each column and one before all: then a change of
    # value is in turn a start and a stop.
    padded = np.zeros(box_w * (box_h + 1) + 1, np.bool_)
    padded[1:].reshape(box_w, box_h + 1)[:, :box_h] = mask.pixels.T
    column, row = np.divmod(np.flatnonzero(padded[1:] != padded[:-1]), box_h + 1)
    edges = (mask.x + column) * height + mask.y + row
    (outline,) = encode_edges(edges, np.array([0, len(edges)]), image_hw)
    if outline is None:
        raise ValueError(f"the mask of {box_h}x{box_w} px at y {mask.y}, x {mask.x} is empty")
    return outline


def encode_box_mask(mask: BoxMask, image_hw: tuple[int, int]) -> dict[str, Any]:
    """COCO compressed RLE of a mask inside an image of [H, W], without building the image.

    Raises:
        ValueError: The mask has no pixel.
    """
    return _outline_box(mask, image_hw).rle


def build_instance(mask: BoxMask, image_hw: tuple[int, int], label: int, score: float) -> Instance:
    """An instance from its pixels; its box is theirs, tight or not.

    Raises:
        ValueError: The mask has no pixel.
    """
    return Instance(label, score, *_outline_box(mask, image_hw))
