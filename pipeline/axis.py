"""The way from the mask stride to the original image along one axis: bilinear resize, twice.

The published code enlarges a mask to the canvas, crops the padding and resizes to the original,
each bilinearly with half-pixel centres. Together that is a mean of at most three neighbouring
inputs for each output.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipeline.types import Float32, Int64


def linear_weights(in_size: int, out_size: int) -> tuple[Int64, Float32]:
    """Bilinear resize along one axis, half-pixel centres (`align_corners=False`).

    Returns:
        Index of the lower neighbour [out_size] and the weight of the upper one [out_size].
    """
    scale = np.float32(in_size) / np.float32(out_size)
    centre = (np.arange(out_size, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    centre = np.clip(centre, 0, in_size - 1).astype(np.float32)
    low = np.minimum(centre.astype(np.int64), max(in_size - 2, 0))
    return low, (centre - low).astype(np.float32)


@dataclass(frozen=True)
class Axis:
    """The resize along one axis; outputs ascend with their inputs.

    Attributes:
        inputs: [3, outputs] indices, ascending; the last one is repeated at the border.
        weights: [3, outputs], of the inputs; some are 0.
        before: [inputs + 1]; entry i is how many outputs depend on inputs below i alone.
        after: [inputs + 1]; entry i is the first output that depends on no input below i.
        scale: Outputs for one input.
    """

    inputs: Int64
    weights: Float32
    before: Int64
    after: Int64
    scale: float

    def outputs_of(self, start: int, stop: int) -> slice:
        """Outputs that depend on any input of a range; may be empty."""
        return slice(int(self.before[start]), int(self.after[stop]))

    def inputs_of(self, outputs: slice) -> tuple[int, int]:
        """First and last input, exclusive, of a range of outputs that is not empty."""
        return int(self.inputs[0, outputs.start]), int(self.inputs[2, outputs.stop - 1]) + 1


def _enlarge(mask_size: int, stride: int, valid: int) -> tuple[Int64, Float32]:
    """Lower input [valid] and three weights [3, valid] of the canvas's px that show the image."""
    low, weight = linear_weights(mask_size, mask_size * stride)
    return low[:valid], np.stack([1 - weight, weight, np.zeros_like(weight)])[:, :valid]


@lru_cache(maxsize=64)
def build_axis(mask_size: int, stride: int, valid: int, original: int) -> Axis:
    """Upsampling by `stride`, cropping and resizing along one axis.

    Args:
        mask_size: Mask's extent at the mask stride.
        stride: Canvas px per mask px.
        valid: Canvas px that show the image.
        original: Extent in the original image, px.
    """
    base, weights = _enlarge(mask_size, stride, valid)
    if valid != original:
        low, share = linear_weights(valid, original)
        upper = np.minimum(low + 1, valid - 1)
        shift = base[upper] - base[low]  # 0 or 1: neighbouring px of the canvas
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
