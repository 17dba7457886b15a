"""Mask stride to original image along one axis: two bilinear resizes composed into one.

The published code upsamples a mask to the canvas, crops the padding and resizes to the original
size, both bilinearly with half-pixel centres. The composition is a weighted mean of at most three
adjacent inputs per output.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipeline.types import Float32, Int64


def linear_weights(in_size: int, out_size: int) -> tuple[Int64, Float32]:
    """Bilinear resize along one axis, half-pixel centres (`align_corners=False`).

    Returns:
        Index of the lower neighbour [out_size] and weight of the upper neighbour [out_size].
    """
    scale = np.float32(in_size) / np.float32(out_size)
    centre = (np.arange(out_size, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    centre = np.clip(centre, 0, in_size - 1).astype(np.float32)
    low = np.minimum(centre.astype(np.int64), max(in_size - 2, 0))
    return low, (centre - low).astype(np.float32)


@dataclass(frozen=True)
class Axis:
    """The composed resize along one axis; output order follows input order.

    Attributes:
        inputs: [3, outputs] input indices, ascending; the last index is repeated at the border.
        weights: [3, outputs] weights of `inputs`; some are 0.
        before: [inputs + 1]; entry i is the number of outputs that depend only on inputs below i.
        after: [inputs + 1]; entry i is the first output that depends on no input below i.
        scale: Outputs per input.
    """

    inputs: Int64
    weights: Float32
    before: Int64
    after: Int64
    scale: float

    def outputs_of(self, start: int, stop: int) -> slice:
        """Outputs that depend on any input in [start, stop); may be empty."""
        return slice(int(self.before[start]), int(self.after[stop]))

    def inputs_of(self, outputs: slice) -> tuple[int, int]:
        """First input and end of inputs (exclusive) of a non-empty range of outputs."""
        return int(self.inputs[0, outputs.start]), int(self.inputs[2, outputs.stop - 1]) + 1


def _enlarge(mask_size: int, stride: int, valid: int) -> tuple[Int64, Float32]:
    """First input [valid] and three weights [3, valid] of each valid canvas px."""
    low, weight = linear_weights(mask_size, mask_size * stride)
    return low[:valid], np.stack([1 - weight, weight, np.zeros_like(weight)])[:, :valid]


@lru_cache(maxsize=64)
def build_axis(mask_size: int, stride: int, valid: int, original: int) -> Axis:
    """Composes upsampling by `stride`, cropping to `valid` and resizing to `original`.

    Args:
        mask_size: Mask size at the mask stride, px.
        stride: Canvas px per mask px.
        valid: Canvas px covered by the image.
        original: Size in the original image, px.
    """
    base, weights = _enlarge(mask_size, stride, valid)
    if valid != original:
        low, share = linear_weights(valid, original)
        upper = np.minimum(low + 1, valid - 1)
        shift = base[upper] - base[low]  # 0 or 1: the canvas px are adjacent
        added = weights[:, upper] * share
        moved = np.concatenate([np.zeros((1, original), np.float32), added[:2]])
        weights = weights[:, low] * (1 - share) + np.where(shift == 0, added, moved)
        base = base[low]
    used = weights > 0
    first = base + used.argmax(axis=0)
    last = base + 2 - used[::-1].argmax(axis=0)
    edges = np.arange(mask_size + 1)
    axis = Axis(
        inputs=np.minimum(base + np.arange(3)[:, None], mask_size - 1),
        weights=weights,
        before=np.searchsorted(last, edges, side="left"),
        after=np.searchsorted(first, edges, side="left"),
        scale=stride * original / valid,
    )
    for array in (axis.inputs, axis.weights, axis.before, axis.after):
        array.setflags(write=False)
    return axis
