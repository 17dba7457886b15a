"""Accepted image inputs, and the bytes that are sent for them."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ImageInput = str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]
"""A path, the bytes of a file, a PIL image, or an array: [H, W] uint8 or uint16, [H, W, 3] uint8
RGB, [H, W, 4] uint8 RGBA."""

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def read_input(image: ImageInput) -> tuple[str | None, bytes]:
    """The file name of a path (else None), and the bytes of an image file.

    Files and bytes are sent unchanged. PIL images and arrays are sent as PNG without EXIF, so that
    the server does not rotate their pixels.

    Raises:
        OSError: The file cannot be read.
        TypeError, ValueError: The input cannot be sent.
    """
    if isinstance(image, bytes):
        return None, image
    if isinstance(image, (str, os.PathLike)):
        path = Path(image)
        return path.name, path.read_bytes()
    if isinstance(image, np.ndarray):
        return None, _write_png(_from_array(image))
    if isinstance(image, Image.Image):
        return None, _write_png(image)
    raise TypeError(
        f"an image is a path, bytes, a PIL image or a numpy array, not {type(image).__name__}"
    )


def _from_array(pixels: NDArray[Any]) -> Image.Image:
    shape_fits = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    grey_16_bit = pixels.ndim == 2 and pixels.dtype == np.uint16
    if not shape_fits or pixels.size == 0 or not (pixels.dtype == np.uint8 or grey_16_bit):
        raise ValueError(
            f"the array is {pixels.dtype} {list(pixels.shape)}; an image is uint8 [H, W], "
            "[H, W, 3] RGB or [H, W, 4] RGBA, or uint16 [H, W]"
        )
    return Image.fromarray(np.ascontiguousarray(pixels))


def _write_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    writable = image if image.mode in _PNG_MODES else image.convert("RGB")
    writable.save(buffer, "PNG", compress_level=1, exif=b"")
    return buffer.getvalue()
