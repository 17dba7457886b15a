"""Pasting by matrix products over every pixel of a mask's box: what `paste_masks` is held to.

Symbols: H W window in the original, h w mask at the mask stride.
"""

from __future__ import annotations

import numpy as np

from pipeline.axis import linear_weights
from pipeline.runs import BoxMask
from pipeline.types import Bool, Float32, Tile

BLOCK = 64
"""Outputs along an axis that are computed at once."""


def axis_matrix(mask_size: int, stride: int, valid: int, original: int) -> Float32:
    """Matrix [original, mask_size] of upsampling by `stride`, cropping and resizing.

    Args:
        mask_size: Mask's extent at the mask stride.
        stride: Canvas px per mask px.
        valid: Canvas px that show the image.
        original: Extent in the original image, px.
    """
    canvas = np.zeros((valid, mask_size), np.float32)
    low, weight = linear_weights(mask_size, mask_size * stride)
    low, weight = low[:valid], weight[:valid]
    rows = np.arange(valid)
    canvas[rows, low] += 1 - weight
    canvas[rows, np.minimum(low + 1, mask_size - 1)] += weight
    if valid == original:
        return canvas
    low, weight = linear_weights(valid, original)
    upper = np.minimum(low + 1, valid - 1)
    return canvas[low] * (1 - weight)[:, None] + canvas[upper] * weight[:, None]


def _apply(matrix: Float32, values: Float32, outputs: slice) -> Float32:
    """Product of some rows of a banded matrix with [inputs, n], block by block."""
    blocks = []
    for start in range(outputs.start, outputs.stop, BLOCK):
        rows = matrix[start : min(start + BLOCK, outputs.stop)]
        inputs = _extent(np.any(rows > 0, axis=0))
        blocks.append(rows[:, inputs] @ values[inputs])
    return np.concatenate(blocks)


def _extent(used: Bool) -> slice:
    """From the first to the last set element; empty if there is none."""
    indices = np.flatnonzero(used)
    return slice(int(indices[0]), int(indices[-1]) + 1) if indices.size else slice(0, 0)


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
    window = tile.window
    down = axis_matrix(probs.shape[0], stride, tile.valid_hw[0], window.height)
    across = axis_matrix(probs.shape[1], stride, tile.valid_hw[1], window.width)
    rows = _extent(np.any(down[:, np.any(above, axis=1)] > 0, axis=1))
    columns = _extent(np.any(across[:, np.any(above, axis=0)] > 0, axis=1))
    if rows.start == rows.stop or columns.start == columns.stop:
        return None  # nothing is above, or only in the padding
    part = _apply(down, probs, rows)
    pixels = _apply(across, np.ascontiguousarray(part.T), columns) > threshold
    if not pixels.any():
        return None
    box_columns, box_rows = _extent(np.any(pixels, axis=1)), _extent(np.any(pixels, axis=0))
    return BoxMask(
        y=window.y + rows.start + box_rows.start,
        x=window.x + columns.start + box_columns.start,
        pixels=pixels[box_columns, box_rows].T,
    )
