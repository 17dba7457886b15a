"""Decoded pixels of any kind become RGB, in stripes: conversions copy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

from pipeline.types import UInt8

_STRIPE_PIXELS = 1 << 18
"""Pixels that are converted at once."""
_CAMERA_BITS = (8, 10, 12, 14, 16)


def stripes(height: int, width: int) -> Iterator[slice]:
    """Ranges of rows that cover an image."""
    rows = max(1, _STRIPE_PIXELS // width)
    for y in range(0, height, rows):
        yield slice(y, min(y + rows, height))


def draw_on_black(rgba: UInt8) -> UInt8:
    """The pixels [H, W, 3] of a transparent image [H, W, 4] on a black ground."""
    pixels = np.empty((*rgba.shape[:2], 3), np.uint8)
    for rows in stripes(*rgba.shape[:2]):
        pixels[rows] = _draw_on_black(Image.fromarray(np.ascontiguousarray(rgba[rows])))
    return pixels


def to_rgb(image: Image.Image) -> UInt8:
    """The pixels [H, W, 3] of an image of any mode; transparency is drawn on black.

    A 16-bit grey image is scaled by the range of the least camera depth that holds its values:
    a 12-bit camera's picture does not come out all but black.
    """
    depth = 16
    if image.mode == "I;16":
        bits = int(max(image.getextrema())).bit_length()  # type: ignore[arg-type]
        depth = next((depth for depth in _CAMERA_BITS if depth >= bits), 16)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for rows in stripes(image.height, image.width):
        stripe = image.crop((0, rows.start, image.width, rows.stop))
        stripe.info = image.info
        pixels[rows] = _stripe_to_rgb(stripe, depth)
    return pixels


def _stripe_to_rgb(image: Image.Image, depth: int) -> UInt8:
    """Rows of an image as RGB; 16-bit values are of `depth` bits."""
    if image.mode == "I;16":
        values = np.asarray(image).astype(np.float32)
        scaled = np.clip(values * (255 / (2**depth - 1)) + 0.5, 0, 255).astype(np.uint8)
        return np.asarray(Image.fromarray(scaled).convert("RGB"))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        return _draw_on_black(image.convert("RGBA"))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _draw_on_black(rgba: Image.Image) -> UInt8:
    black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
    return np.asarray(Image.alpha_composite(black, rgba).convert("RGB"))
