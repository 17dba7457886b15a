"""From a soft mask at the mask stride to the run lengths of the original image.

The published code enlarges the mask to the canvas bilinearly, crops the padding, resizes to
the original bilinearly and thresholds. Both steps are linear and separable, so they are one
matrix along each axis; here these are applied inside each mask's own box only, one mask at a
time, and no full-size mask ever exists.

Symbols: H W window in the original, h w mask at the mask stride.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from service.pipeline.types import Float32, Instance, Tile

Bool = NDArray[np.bool_]


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


@lru_cache(maxsize=256)
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
    matrix = canvas[low] * (1 - weight)[:, None] + canvas[upper] * weight[:, None]
    matrix.setflags(write=False)
    return matrix


@dataclass(frozen=True)
class BoxMask:
    """A mask inside its box: pixels [bh, bw], top-left corner y, x in the image."""

    y: int
    x: int
    pixels: Bool


def _support(matrix: Float32, inside: Bool) -> tuple[slice, slice]:
    """Output range that can exceed the threshold, and the inputs that it depends on."""
    touched = np.flatnonzero((matrix[:, inside] > 0).any(axis=1))
    rows = slice(int(touched[0]), int(touched[-1]) + 1)
    inputs = np.flatnonzero((matrix[rows] > 0).any(axis=0))
    return rows, slice(int(inputs[0]), int(inputs[-1]) + 1)


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
    down = axis_matrix(probs.shape[0], stride, tile.valid_hw[0], window.height)
    across = axis_matrix(probs.shape[1], stride, tile.valid_hw[1], window.width)
    used_rows, used_columns = np.any(above, axis=1), np.any(above, axis=0)
    if not (down[:, used_rows] > 0).any() or not (across[:, used_columns] > 0).any():
        return None  # the mask lies in the padding alone
    out_rows, in_rows = _support(down, used_rows)
    out_columns, in_columns = _support(across, used_columns)
    part = down[out_rows, in_rows] @ probs[in_rows, in_columns]
    pixels = part @ across[out_columns, in_columns].T > threshold
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    if rows.size == 0:
        return None
    tight = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    y = window.y + out_rows.start + int(rows[0])
    x = window.x + out_columns.start + int(columns[0])
    return BoxMask(y, x, tight)


def encode_box_mask(mask: BoxMask, image_hw: tuple[int, int]) -> dict[str, Any]:
    """COCO compressed RLE of a mask inside an image of [H, W], without building the image.

    Equal, byte for byte, to pycocotools' encoding of the full-size mask.
    """
    height, width = image_hw
    box_h, box_w = mask.pixels.shape
    column_major = np.zeros((box_w, box_h + 2), np.int8)
    column_major[:, 1:-1] = mask.pixels.T
    change = np.diff(column_major, axis=1)
    column, start = np.nonzero(change == 1)
    _, stop = np.nonzero(change == -1)
    base = (mask.x + column) * height + mask.y
    starts, stops = base + start, base + stop
    # Runs that touch across a column border (a box as high as the image) are one run.
    joined = starts[1:] == stops[:-1]
    starts = starts[np.r_[True, ~joined]]
    stops = stops[np.r_[~joined, True]]
    edges = np.empty(2 * len(starts) + 2, np.int64)
    edges[0], edges[-1] = 0, height * width
    edges[1:-1:2], edges[2:-1:2] = starts, stops
    counts = np.diff(edges)
    if counts[-1] == 0:
        counts = counts[:-1]
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
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
