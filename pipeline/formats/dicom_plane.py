"""One frame of a DICOM.

Symbols: H W frame, h w region, S samples of a pixel.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CorruptImage, UnsupportedFormat
from pipeline.formats import libtiff
from pipeline.formats.base import FileRanges
from pipeline.types import Window

_ITEM = 0xE000FFFE
"""An item's tag as one little-endian number."""
_ITEM_BYTES, _RLE_HEADER_BYTES = 8, 64


@dataclass(frozen=True, kw_only=True)
class FrameLayout:
    """How the frames of a file are stored.

    Attributes:
        hw: H and W.
        samples: S.
        dtype: Of a sample.
        bits_stored: Of a sample that count; the higher ones are something else.
        is_planar: All of a sample's values come before the next sample's.
        is_rle: In DICOM's RLE: PackBits for each byte of the samples.
    """

    hw: tuple[int, int]
    samples: int
    dtype: np.dtype[Any]
    bits_stored: int
    is_planar: bool
    is_rle: bool

    @property
    def frame_bytes(self) -> int:
        """Of a frame that is not compressed."""
        height, width = self.hw
        return height * width * self.samples * self.dtype.itemsize


class DicomPlane:
    """A frame; any number of threads may read it.

    Args:
        data: The file.
        place: Where the frame begins in it, and its bytes.
        layout: How it is stored.
        name: For messages.

    Attributes:
        dtype: Of the samples.
    """

    def __init__(
        self, data: FileRanges, place: tuple[int, int], layout: FrameLayout, name: str
    ) -> None:
        self._data, self._place, self._layout, self._name = data, place, layout, name
        self.dtype = layout.dtype

    def read(self, region: Window, samples: Sequence[int]) -> NDArray[Any]:
        """The region [h, w, len(samples)].

        Raises:
            CorruptImage: The frame is damaged.
        """
        pixels = self._read_rle() if self._layout.is_rle else self._read_plain()
        rows = slice(region.y, region.y + region.height)
        columns = slice(region.x, region.x + region.width)
        return self._keep_stored(pixels[rows, columns][..., list(samples)])

    def _read_plain(self) -> NDArray[Any]:
        return self._shape(np.frombuffer(self._data.read(*self._place), self._layout.dtype))

    def _shape(self, values: NDArray[Any]) -> NDArray[Any]:
        layout = self._layout
        if layout.is_planar:
            return np.moveaxis(values.reshape(layout.samples, *layout.hw), 0, -1)
        return values.reshape(*layout.hw, layout.samples)

    def _keep_stored(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """The values of the bits that count; the sign is their highest."""
        unused = 8 * self.dtype.itemsize - self._layout.bits_stored
        if not unused:
            return np.ascontiguousarray(pixels)
        wide = np.left_shift(pixels, unused)
        return np.asarray(np.right_shift(wide, unused, out=wide))

    def _read_rle(self) -> NDArray[Any]:
        """Segments of a byte of a sample each, the highest byte of the first sample first."""
        layout = self._layout
        frame = self._data.read(*self._place)
        if len(frame) < _RLE_HEADER_BYTES:
            raise CorruptImage(f"{self._name} of the DICOM has {len(frame)} bytes")
        count, *offsets = struct.unpack_from("<16I", frame)
        size = layout.dtype.itemsize
        if count != layout.samples * size:
            raise CorruptImage(
                f"{self._name} of the DICOM has {count} RLE segments, not {layout.samples * size}"
            )
        height, width = layout.hw
        pixels = np.empty((height, width, layout.samples, size), np.uint8)
        ends = [*offsets[1:count], len(frame)]
        for number, (start, end) in enumerate(zip(offsets, ends, strict=False)):
            sample, byte = divmod(number, size)
            try:
                content = libtiff.decompress(frame[start:end], libtiff.PACKBITS, height * width)
            except OSError as error:
                raise CorruptImage(
                    f"RLE segment {number} of {self._name} of the DICOM is damaged"
                ) from error
            values = np.frombuffer(content, np.uint8).reshape(height, width)
            pixels[:, :, sample, size - 1 - byte] = values
        return pixels.view(layout.dtype)[..., 0]


def find_frames(
    data: FileRanges, start: int, length: int, frames: int, frame_bytes: int
) -> list[tuple[int, int]]:
    """Where frames lie that are not compressed, and their bytes.

    Args:
        data: The file.
        start: Of the pixels' value.
        length: Of it.
        frames: How many there should be.
        frame_bytes: Of each.

    Raises:
        CorruptImage: Some are missing.
    """
    found = min(length, data.size - start)
    if frames * frame_bytes > found:
        raise CorruptImage(
            f"the DICOM has {frames} frames of {frame_bytes} bytes by its header, but {found} "
            "bytes of pixels"
        )
    return [(start + number * frame_bytes, frame_bytes) for number in range(frames)]


def find_items(data: FileRanges, start: int, frames: int) -> list[tuple[int, int]]:
    """Where frames lie that have an item each, and their bytes.

    The first item of all is a table of the others.

    Raises:
        CorruptImage: Some are missing.
        UnsupportedFormat: There are more items than frames.
    """
    found: list[tuple[int, int]] = []
    position = start
    while len(found) <= frames:
        tag, length = _read_item(data, position)
        first = position + _ITEM_BYTES
        position = first + length
        if tag != _ITEM or position > data.size:
            raise CorruptImage(
                f"the DICOM has {frames} frames by its header, but {max(0, len(found) - 1)} whole "
                "ones"
            )
        found.append((first, length))
    if _read_item(data, position)[0] == _ITEM:
        raise UnsupportedFormat("a DICOM with frames in several fragments is not read")
    return found[1:]


def _read_item(data: FileRanges, position: int) -> tuple[int, int]:
    """Tag and length of an item; zeros where the file ends."""
    head = data.read(position, _ITEM_BYTES)
    return struct.unpack("<II", head) if len(head) == _ITEM_BYTES else (0, 0)
