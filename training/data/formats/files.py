"""Reads the files of data sets; every error names the file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.data.records import DatasetError

PICTURES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"))
"""Suffixes of image files."""
_MASK_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "RGB", "RGBA", "LA")


def read_bytes(path: Path) -> bytes:
    """The content of a file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror or error}") from error


def read_start(path: Path, size: int = 1 << 20) -> bytes:
    """The first bytes of a file; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError:
        return b""


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark."""
    data = read_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at position {error.start}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        content = json.loads(read_text(path))
    except DatasetError:
        raise
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


def read_mask(path: Path) -> NDArray[Any]:
    """The pixels of a mask, not scaled: [H, W] values or palette indices, or [H, W, 3] colours."""
    try:
        with Image.open(path) as file:
            image: Image.Image = file
            if getattr(image, "n_frames", 1) > 1:
                raise DatasetError(f"{path} has {getattr(image, 'n_frames', 1)} pages, not one")
            if image.mode not in _MASK_MODES:
                raise DatasetError(f"{path} has pixels of mode {image.mode}, no integers")
            if image.mode in ("RGBA", "LA"):
                image = image.convert("RGB" if image.mode == "RGBA" else "L")
            pixels = np.asarray(image)
    except DatasetError:
        raise
    except Exception as error:  # Pillow raises what its decoders raise
        raise DatasetError(f"{path} cannot be decoded: {error}") from error
    return pixels


def walk(folder: Path, suffixes: frozenset[str]) -> Iterator[Path]:
    """The files below a folder with one of the suffixes, in a fixed order; no hidden ones."""
    seen: set[str] = set()
    for name, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(name)
        folders[:] = [] if real in seen else sorted(f for f in folders if not f.startswith("."))
        if real in seen:
            continue
        seen.add(real)
        for file in sorted(files):
            path = Path(name, file)
            if path.suffix.lower() in suffixes and not file.startswith("."):
                yield path
