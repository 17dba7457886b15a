"""From a soft mask at the mask stride to the run lengths of the original image.

The published code enlarges the mask to the canvas bilinearly, crops the padding, resizes to
the original bilinearly and thresholds. Both steps are linear and separable, so they are one
matrix along each axis; here these are applied inside each mask's own box only, one mask at a
time, and no full-size mask ever exists.

Symbols: H W window in the original, h w mask at the mask stride.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from service.pipeline.types import Float32, Instance, Tile

Bool = NDArray[np.bool_]
BLOCK = 64
"""Outputs along an axis that are computed at once."""


def linear_weights(in_size: int, out_size: int) -> tuple[NDArray[np.int64], Float32]:
    """Bilinear resize along one axis, half-pixel centres (`align_corners=False`).

    Returns:
        Index of the lower neighbour [out_size] and the weight of the upper one [out_size].
    """
    scale = np.float32(in_size) / np.float32(out_size)
    centre = (np.arange(out_size, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    centre = np.clip(centre, 0, in_size - 1).astype(np.float32)
    low = np.minimum(centre.astype(np.int64), max(in_size - 2, 0))
    return low, (centre - low).astype(np.float32)


def axis_matrix(mask_size: int, stride: int, valid: int, original: int) -> Float32:
    """Matrix [original, mask_size] of upsampling by `stride`, cropping and resizing.

    Args:
        mask_size: Mask's extent at the mask stride.
        stride: Canvas px per mask px.
        valid: Canvas px that show the image.
        original: Extent in the original image, px.
    """
    canvas = np.zeros((valid, mask_size), np.float32)
    low, weight = (a[:valid] for a in linear_weights(mask_size, mask_size * stride))
    rows = np.arange(valid)
    canvas[rows, low] += 1 - weight
    canvas[rows, np.minimum(low + 1, mask_size - 1)] += weight
    if valid == original:
        return canvas
    low, weight = linear_weights(valid, original)
    upper = np.minimum(low + 1, valid - 1)
    return canvas[low] * (1 - weight)[:, None] + canvas[upper] * weight[:, None]


@dataclass(frozen=True)
class Axis:
    """The resize along one axis: a matrix with at most three weights a row, close together.

    Attributes:
        matrix: [outputs, inputs].
        first, last: Range of inputs that each output depends on, both ascending.
    """

    matrix: Float32
    first: NDArray[np.int64]
    last: NDArray[np.int64]

    def outputs_of(self, inputs: slice) -> slice:
        """Outputs that depend on any input of a range; may be empty."""
        start = int(np.searchsorted(self.last, inputs.start, side="left"))
        return slice(start, int(np.searchsorted(self.first, inputs.stop - 1, side="right")))

    def apply(self, values: Float32, outputs: slice) -> Iterator[tuple[slice, Float32]]:
        """Product with [inputs, n], as blocks (where in `outputs`, [rows, n])."""
        for start in range(outputs.start, outputs.stop, BLOCK):
            stop = min(start + BLOCK, outputs.stop)
            inputs = slice(int(self.first[start]), int(self.last[stop - 1]) + 1)
            place = slice(start - outputs.start, stop - outputs.start)
            yield place, self.matrix[start:stop, inputs] @ values[inputs]


@lru_cache(maxsize=16)
def build_axis(mask_size: int, stride: int, valid: int, original: int) -> Axis:
    """The axis of `axis_matrix`; the last few are kept, some MB each for large images."""
    matrix = axis_matrix(mask_size, stride, valid, original)
    used = matrix > 0
    first = used.argmax(axis=1)
    last = mask_size - 1 - used[:, ::-1].argmax(axis=1)
    for array in (matrix, first, last):
        array.setflags(write=False)
    return Axis(matrix, first, last)


@dataclass(frozen=True)
class BoxMask:
    """A mask inside its box: pixels [bh, bw], top-left corner y, x in the image."""

    y: int
    x: int
    pixels: Bool


def _extent(used: Bool) -> slice:
    """From the first to the last set element."""
    indices = np.flatnonzero(used)
    return slice(int(indices[0]), int(indices[-1]) + 1)


def paste_mask(probs: Float32, tile: Tile, stride: int, threshold: float = 0.5) -> BoxMask | None:
    """A soft mask as pixels of the original image.

    Args:
        probs: [h, w] at the mask stride of the tile's canvas.
        tile: Where the canvas came from.
        stride: Canvas px per mask px.
        threshold: A pixel belongs to the mask above this.

    Returns:
        The tight box of the mask's pixels, or None if there are none.
    """
    above = probs > threshold
    if not above.any():
        return None
    window = tile.window
    down = build_axis(probs.shape[0], stride, tile.valid_hw[0], window.height)
    across = build_axis(probs.shape[1], stride, tile.valid_hw[1], window.width)
    rows = down.outputs_of(_extent(np.any(above, axis=1)))
    columns = across.outputs_of(_extent(np.any(above, axis=0)))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return None  # the mask lies in the padding alone
    part = np.empty((probs.shape[1], rows.stop - rows.start), np.float32)
    for place, block in down.apply(probs, rows):
        part[:, place] = block.T
    pixels = np.empty((columns.stop - columns.start, rows.stop - rows.start), np.bool_)
    for place, block in across.apply(part, columns):
        np.greater(block, threshold, out=pixels[place])
    if not pixels.any():
        return None
    box_columns, box_rows = _extent(np.any(pixels, axis=1)), _extent(np.any(pixels, axis=0))
    return BoxMask(
        y=window.y + rows.start + box_rows.start,
        x=window.x + columns.start + box_columns.start,
        pixels=pixels[box_columns, box_rows].T,
    )


def encode_box_mask(mask: BoxMask, image_hw: tuple[int, int]) -> dict[str, Any]:
    """COCO compressed RLE of a mask inside an image of [H, W], without building the image.

    Equal, byte for byte, to pycocotools' encoding of the full-size mask.
    """
    height, width = image_hw
    box_h, box_w = mask.pixels.shape
    # Column-major with one empty pixel below each column and one before all: then a change of
    # value is in turn a start and a stop.
    padded = np.zeros(box_w * (box_h + 1) + 1, np.bool_)
    padded[1:].reshape(box_w, box_h + 1)[:, :box_h] = mask.pixels.T
    column, row = np.divmod(np.flatnonzero(padded[1:] != padded[:-1]), box_h + 1)
    edges = (mask.x + column) * height + mask.y + row
    if box_h == height:  # runs that touch across a column border are one run
        joined = np.flatnonzero(edges[1:-1:2] == edges[2::2])
        edges = np.delete(edges, np.concatenate([2 * joined + 1, 2 * joined + 2]))
    counts = np.diff(np.concatenate([[0], edges, [height * width]]))
    if counts[-1] == 0:
        counts = counts[:-1]
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": rle["counts"]}


def build_instance(mask: BoxMask, image_hw: tuple[int, int], label: int, score: float) -> Instance:
    """An instance from its pixels."""
    box_h, box_w = mask.pixels.shape
    return Instance(
        label=label,
        score=score,
        rle=encode_box_mask(mask, image_hw),
        bbox_xywh=(mask.x, mask.y, box_w, box_h),
        area=int(np.count_nonzero(mask.pixels)),
    )
