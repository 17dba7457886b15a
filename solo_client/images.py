"""Accepted image inputs, and the bytes that are sent for them."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Encoded = bytes | bytearray | memoryview
ImageInput = (
    str | os.PathLike[str] | os.PathLike[bytes] | Encoded | IO[bytes] | Image.Image | NDArray[Any]
)
"""A path, the bytes of a file, a file open in binary mode, a PIL image, or an array: [H, W] uint8
or uint16, [H, W, 3] uint8 RGB, [H, W, 4] uint8 RGBA."""

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def read_input(image: ImageInput) -> tuple[str | None, bytes]:
    """The file name of a path or an open file (else None), and the bytes of an image file.

    Files and bytes are sent unchanged; an open file is read from its start if it can seek. PIL
    images and arrays are sent as PNG without EXIF, so that the server does not rotate their pixels.

    Raises:
        OSError: The file cannot be read.
        TypeError, ValueError: The input cannot be sent.
    """
    if isinstance(image, Encoded):
        return None, bytes(image)
    if isinstance(image, (str, os.PathLike)):
        path = Path(os.fsdecode(image))
        return path.name, path.read_bytes()
    if isinstance(image, np.ndarray):
        return None, _write_png(_from_array(image))
    if isinstance(image, Image.Image):
        return None, _write_png(image)
    if callable(getattr(image, "read", None)):
        return _read_file(image)
    raise TypeError(
        "an image is a path, bytes, a file open in binary mode, a PIL image or a numpy array, not "
        f"{type(image).__name__}"
    )


def _read_file(file: IO[bytes]) -> tuple[str | None, bytes]:
    path = getattr(file, "name", None)
    name = os.path.basename(os.fsdecode(path)) if isinstance(path, (str, bytes)) else None
    shown = type(file).__name__ if name is None else f"{type(file).__name__} {name!r}"
    if hasattr(file, "encoding"):
        raise TypeError(f"{shown} is open as text; open it in binary mode ('rb')")
    with suppress(AttributeError, OSError):  # a pipe cannot seek
        file.seek(0)
    data: object = file.read()
    if not isinstance(data, Encoded):
        raise TypeError(f"read() of {shown} gives {type(data).__name__}, not bytes")
    return name, bytes(data)


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
    if 0 in image.size:
        raise ValueError(f"the image has no pixels: {image.width} x {image.height}")
    buffer = io.BytesIO()
    writable = image if image.mode in _PNG_MODES else image.convert("RGB")
    writable.save(buffer, "PNG", compress_level=1, exif=b"")
    return buffer.getvalue()
