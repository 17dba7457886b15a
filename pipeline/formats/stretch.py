"""Samples of more than 8 bits become 8 bits: the model's contrast rule at full precision."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.formats.convert import stripes
from pipeline.model_config import ContrastSpec
from pipeline.types import UInt8

DEFAULT = ContrastSpec(low=0.1, high=99.9, min_range=1.0)
"""For models without a contrast rule."""
_CAMERA_BITS = (8, 10, 12, 14, 16, 24, 32, 64)
_MOST_VALUES = 1 << 22
"""More values than these are sampled evenly for the percentiles of types without a histogram."""
_LEAST_DIFFERENCE = 1e-300
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def find_limits(pixels: NDArray[Any], spec: ContrastSpec | None) -> tuple[float, float]:
    """The values that become 0 and 255: two percentiles of the grey values.

    They are at least `min_range` of 255 parts of the sensor's range apart: of the least usual depth
    (8, 10, 12, 14, 16 bits ...) that holds the upper one. Floating-point values have no such range.

    Args:
        pixels: [H, W, S], S 1 or 3, of any real type; values that are not finite do not count.
        spec: The model's; None takes `DEFAULT`.
    """
    spec = spec or DEFAULT
    if pixels.dtype == np.uint16 and pixels.shape[2] == 1:
        return limits_of_counts(count_values(pixels), spec)
    low, high = _percentiles(pixels, spec)
    if pixels.dtype.kind == "f":
        return low, max(high, float(np.nextafter(low, np.inf)))
    return low, max(high, low + least_range(high, spec))


def least_range(high: float, spec: ContrastSpec) -> float:
    """The least difference that is stretched, for integers with this upper percentile."""
    return spec.min_range / 255 * _sensor_ranges(high)[0]


def _sensor_ranges(high: float) -> list[float]:
    """The greatest values of sensors that may have given this upper percentile, ascending."""
    bits = min(int(abs(high)).bit_length(), _CAMERA_BITS[-1])  # 2**64 - 1 is rounded up
    return [float(2**depth - 1) for depth in _CAMERA_BITS if depth >= bits]


def undo_stretch(limits: tuple[float, float], dtype: np.dtype[Any]) -> UInt8:
    """Maps [K, 256] from stretched intensities to those that a camera of 8 bits may have recorded.

    There is one for each range that the sensor may have had. Floating-point values have 0..1, or up
    to the upper limit if that is greater; without positive values nothing is mapped.

    Args:
        limits: What `stretch` was given.
        dtype: Of the samples.
    """
    low, high = limits
    if high <= 0:
        return np.arange(256, dtype=np.uint8)[None]
    if dtype.kind == "f":
        ranges = [max(1.0, high)]
    else:
        ranges = [most for most in _sensor_ranges(high) if most < 256.0**dtype.itemsize]
    values = np.stack([np.linspace(low / most, high / most, 256) for most in ranges or [high]])
    return (np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8)


def count_values(pixels: NDArray[np.uint16]) -> NDArray[np.int64]:
    """Histogram [65536] of grey values [H, W, 1]."""
    counts = np.zeros(1 << 16, np.int64)
    for rows in stripes(*pixels.shape[:2]):
        counts += np.bincount(pixels[rows].ravel(), minlength=1 << 16)
    return counts


def limits_of_counts(counts: NDArray[np.int64], spec: ContrastSpec) -> tuple[float, float]:
    """`find_limits` of the values of a histogram."""
    total = np.cumsum(counts)
    places = [q / 100 * (int(total[-1]) - 1) for q in (spec.low, spec.high)]
    low, high = map(float, np.searchsorted(total, places, side="right"))
    return low, max(high, low + least_range(high, spec))


def _percentiles(pixels: NDArray[Any], spec: ContrastSpec) -> tuple[float, float]:
    height, width = pixels.shape[:2]
    step = max(1, -(-height * width // _MOST_VALUES))
    grey = to_grey(pixels.reshape(height * width, -1)[::step])
    grey = grey[np.isfinite(grey)]
    if not grey.size:
        return 0.0, 0.0
    low, high = np.percentile(grey, (spec.low, spec.high))
    return float(low), float(high)


def to_grey(pixels: NDArray[Any]) -> NDArray[np.floating[Any]]:
    """Grey values [...] of samples [..., 1] or [..., 3]."""
    with np.errstate(invalid="ignore"):
        wide: NDArray[np.floating[Any]] = pixels.astype(
            np.float64 if pixels.dtype.itemsize > 2 else np.float32
        )
    return wide[..., 0] if wide.shape[-1] == 1 else np.asarray(wide @ _LUMA.astype(wide.dtype))


def stretch(pixels: NDArray[Any], limits: tuple[float, float]) -> UInt8:
    """Maps a range of values to 0..255, in stripes.

    Args:
        pixels: [H, W, S], S 1 or 3, of any real type. NaN becomes 0.
        limits: The values that become 0 and 255; those beyond saturate.

    Returns:
        [H, W, 3].
    """
    low, high = limits
    out = np.empty((*pixels.shape[:2], 3), np.uint8)
    for rows in stripes(*pixels.shape[:2]):
        with np.errstate(over="ignore", invalid="ignore"):
            wide = pixels[rows].astype(np.float64)
            wide -= low
            wide *= 255 / max(high - low, _LEAST_DIFFERENCE)
            wide += 0.5
        np.nan_to_num(wide, copy=False, nan=0.0)
        out[rows] = np.clip(wide, 0, 255).astype(np.uint8)
    return out
