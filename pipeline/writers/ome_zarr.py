"""Label images as OME-Zarr 0.4 (Zarr version 2) in a ZIP, as Zarr's ZIP stores have it.

Chunks are written as they are drawn, and those without instances are left out, so that memory does
not grow with the height of an image. The format is JSON and zlib: no package is needed to write it.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.types import Window
from pipeline.writers.labels import LabelImage, pad_tile
from pipeline.writers.page import Page

CHUNK_PX = 512
_LEAST_PX = 1024
"""The smallest level of the pyramid has no longer sides."""
_ZLIB_LEVEL = 1
_NO_DATE = (1980, 1, 1, 0, 0, 0)
_VERSION = "0.4"


def write_ome_zarr(page: Page, file: BinaryIO) -> None:
    """A pyramid of label images; each level has every second pixel of the one before."""
    labels = LabelImage(page)
    shapes = _list_shapes(labels.image_hw)
    with zipfile.ZipFile(file, "w") as archive:
        _add_json(archive, ".zgroup", {"zarr_format": 2})
        _add_json(archive, ".zattrs", _describe(page, len(shapes)))
        for number, shape in enumerate(shapes):
            _add_json(archive, f"{number}/.zarray", _describe_array(shape, labels.dtype))
        level: _Level | None = None
        for number in range(len(shapes) - 1, 0, -1):
            level = _Level(archive, number, shapes[number], labels.dtype, level)
        for window, pixels in labels.iterate_tiles(CHUNK_PX):
            _add_chunk(archive, 0, window, pixels)
            if level is not None:
                level.add(window, pixels)


def _list_shapes(image_hw: tuple[int, int]) -> list[tuple[int, int]]:
    height, width = image_hw
    shapes = [(height, width)]
    while max(height, width) > _LEAST_PX:
        height, width = -(-height // 2), -(-width // 2)
        shapes.append((height, width))
    return shapes


class _Level:
    """A level of the pyramid but the first, of which one row of chunks is held.

    Args:
        archive: Gets the chunks.
        number: Of the level.
        shape: Height and width.
        dtype: Of the labels.
        smaller: The next level.
    """

    def __init__(
        self,
        archive: zipfile.ZipFile,
        number: int,
        shape: tuple[int, int],
        dtype: np.dtype[Any],
        smaller: _Level | None,
    ) -> None:
        self._archive, self._number, self._shape, self._smaller = archive, number, shape, smaller
        self._rows = np.zeros((CHUNK_PX, shape[1]), dtype)

    def add(self, window: Window, pixels: NDArray[Any]) -> None:
        """Takes a chunk of the level before; the chunks come row by row."""
        y, x = window.y // 2, window.x // 2
        some = pixels[::2, ::2]
        top = y % CHUNK_PX
        self._rows[top : top + some.shape[0], x : x + some.shape[1]] = some
        height, width = self._shape
        end = y + some.shape[0]
        if x + some.shape[1] == width and (end % CHUNK_PX == 0 or end == height):
            self._flush(end)

    def _flush(self, end: int) -> None:
        top = (end - 1) // CHUNK_PX * CHUNK_PX
        for x in range(0, self._shape[1], CHUNK_PX):
            pixels = self._rows[: end - top, x : x + CHUNK_PX]
            window = Window(top, x, *pixels.shape)
            _add_chunk(self._archive, self._number, window, pixels)
            if self._smaller is not None:
                self._smaller.add(window, pixels)


def _add_chunk(archive: zipfile.ZipFile, level: int, window: Window, pixels: NDArray[Any]) -> None:
    if not pixels.any():
        return
    chunk = pad_tile(pixels, CHUNK_PX).astype(pixels.dtype.newbyteorder("<"))
    name = f"{level}/{window.y // CHUNK_PX}/{window.x // CHUNK_PX}"
    _add(archive, name, zlib.compress(chunk.tobytes(), _ZLIB_LEVEL))


def _add_json(archive: zipfile.ZipFile, name: str, content: dict[str, Any]) -> None:
    _add(archive, name, json.dumps(content, indent=1).encode())


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name, _NO_DATE), data, zipfile.ZIP_STORED)


def _describe_array(shape: tuple[int, int], dtype: np.dtype[Any]) -> dict[str, Any]:
    return {
        "zarr_format": 2,
        "shape": list(shape),
        "chunks": [CHUNK_PX, CHUNK_PX],
        "dtype": dtype.newbyteorder("<").str,
        "compressor": {"id": "zlib", "level": _ZLIB_LEVEL},
        "fill_value": 0,
        "order": "C",
        "filters": None,
        "dimension_separator": "/",
    }


def _describe(page: Page, levels: int) -> dict[str, Any]:
    unit = {} if page.um_per_px is None else {"unit": "micrometer"}
    size = page.um_per_px or 1.0
    return {
        "multiscales": [
            {
                "version": _VERSION,
                "name": page.name,
                "axes": [{"name": axis, "type": "space", **unit} for axis in "yx"],
                "datasets": list(_describe_levels(levels, size)),
                "type": "nearest",
            }
        ],
        "image-label": {"version": _VERSION},
    }


def _describe_levels(levels: int, size: float) -> Iterator[dict[str, Any]]:
    for number in range(levels):
        scale = size * 2.0**number
        scaling = {"type": "scale", "scale": [scale, scale]}
        yield {"path": str(number), "coordinateTransformations": [scaling]}
