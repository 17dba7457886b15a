"""An OME-Zarr image as a stack of planes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pipeline.errors import CorruptImage, DecodeError, UnsupportedFormat
from pipeline.formats.ngff import read_json, read_ngff
from pipeline.formats.parts import OpenPlanes, PartedPlane, Samples, check_part_bytes
from pipeline.formats.planes import Stack
from pipeline.formats.zarr_array import ZarrArray, read_array
from pipeline.formats.zarr_zip import ZarrFiles

EXTRA = "science"
MAX_PLANES = 100_000
_USUAL_PARTS, _LEAST_PART_PX = 4096, 64 * 32
"""More parts than this must have so many pixels on the average: each takes a millisecond."""
_LEAST_SIDE_PX = 512
"""Smaller chunks are read several at once."""


class ZarrStack:
    """The first image of an OME-Zarr, at full size.

    Args:
        files: Of the Zarr.

    Attributes:
        height, width: Of the planes.
        stack: Axes and channels.
        um_per_px: Size of a pixel, if it is stated.
        orientation, palette, has_alpha, is_inverted: As those of a `TiffStack`; there are none.
        bits: Of a sample.

    Raises:
        DecodeError: The Zarr is damaged, or of a kind that is not read.
    """

    orientation = 1
    palette = None
    has_alpha = False
    is_inverted = False

    def __init__(self, files: ZarrFiles) -> None:
        image = read_ngff(files)
        found = read_json(files, f"{image.path}/zarr.json") or read_json(
            files, f"{image.path}/.zarray"
        )
        if found is None:
            raise CorruptImage(f"the OME-Zarr has no array at {image.path!r}")
        self._array = read_array(found)
        shape = self._array.shape
        if len(shape) != len(image.axes):
            raise CorruptImage(
                f"the OME-Zarr has {len(image.axes)} axes, but an array of {len(shape)}"
            )
        self._axes = image.axes[:-2]
        self.height, self.width = shape[-2:]
        axes = {axis: length for axis, length in zip(self._axes, shape, strict=False) if length > 1}
        count = axes.get("C", 1)
        self.stack = Stack(
            axes,
            samples=1,
            is_colour=False,
            channels=image.channels if len(image.channels) == count else (),
        )
        if self.stack.planes > MAX_PLANES:
            raise CorruptImage(f"the OME-Zarr has more than {MAX_PLANES} planes")
        self.um_per_px = image.um_per_px
        self.bits = 1 if self._array.dtype == np.bool_ else 8 * self._array.dtype.itemsize
        self._check_parts()
        self._opened = _open(files, image.path, self._array)
        self._planes = OpenPlanes(self._open_plane)

    def _check_parts(self) -> None:
        hw, part_hw = (self.height, self.width), self._array.part[-2:]
        check_part_bytes(self._array.part_bytes, hw, "a chunk of the Zarr")
        count = math.prod(-(-side // part) for side, part in zip(hw, part_hw, strict=True))
        if count > max(_USUAL_PARTS, self.height * self.width // _LEAST_PART_PX):
            raise UnsupportedFormat(
                f"a Zarr of {self.width}x{self.height} px in chunks of {part_hw[1]}x{part_hw[0]} "
                "px is not read: they are too small"
            )

    def plane(self, index: int) -> ZarrPlane:
        """A plane; the last ones keep parts that they have decoded."""
        return self._planes.get(index)

    def _open_plane(self, index: int) -> ZarrPlane:
        position = np.unravel_index(index, [*self.stack.axes.values()] or [1])
        along = dict(zip(self.stack.axes, map(int, position), strict=False))
        place = tuple(along.get(axis, 0) for axis in self._axes)
        return ZarrPlane(self._opened, self._array, place)


class ZarrPlane(PartedPlane):
    """A plane.

    Args:
        opened: The array, as the library reads it.
        array: Its metadata.
        place: Of the plane, on the axes before height and width.
    """

    def __init__(self, opened: Any, array: ZarrArray, place: tuple[int, ...]) -> None:
        height, width = array.shape[-2:]
        rows, columns = (side * -(-_LEAST_SIDE_PX // side) for side in array.part[-2:])
        super().__init__((height, width), 1, array.dtype, (rows, columns), array.fill)
        self._opened, self._place = opened, place

    def decode_part(self, index: int) -> Samples | None:
        """As `PartedPlane.decode_part`."""
        row, column = divmod(index, self.grid[1])
        y, x = row * self.part_hw[0], column * self.part_hw[1]
        region = slice(y, y + self.part_hw[0]), slice(x, x + self.part_hw[1])
        try:
            values = self._opened[(*self._place, *region)]
        except (DecodeError, MemoryError):
            raise
        except Exception as error:  # of any kind
            raise CorruptImage(f"a chunk of the Zarr is damaged: {error}") from error
        return np.asarray(values, self.dtype)[..., None]


def _open(files: ZarrFiles, path: str, array: ZarrArray) -> Any:
    try:
        from pipeline.formats.zarr_library import open_array
    except ImportError as error:
        raise UnsupportedFormat(
            f"OME-Zarr is read only with the extra '{EXTRA}' of solo-serve ({error})"
        ) from error
    try:
        return open_array(files, path, array)
    except Exception as error:  # of any kind
        raise CorruptImage(f"the metadata of the Zarr's array are damaged: {error}") from error
