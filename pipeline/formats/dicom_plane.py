"""A plane of a DICOM: one frame, or the frames that are the tiles of a slide.

Symbols: H W frame, S samples of a pixel.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipeline.errors import CorruptImage, UnsupportedFormat
from pipeline.formats import jpeg, jpeg2000, libtiff
from pipeline.formats.base import FileRanges
from pipeline.formats.parts import PartedPlane, Samples

Coding = Literal["plain", "rle", "jpeg", "jpeg2000"]
_ITEM = 0xE000FFFE
"""An item's tag as one little-endian number."""
_ITEM_BYTES, _RLE_HEADER_BYTES = 8, 64
_ADOBE = b"\xff\xee\0\x0eAdobe"
"""Start of the segment of a JPEG that says what its colours are."""
_ADOBE_RGB = _ADOBE + b"\0\x64\0\0\0\0\0"
_ADOBE_WITHIN = 4096


@dataclass(frozen=True, kw_only=True)
class FrameLayout:
    """How the frames of a file are stored.

    Attributes:
        hw: H and W.
        samples: S.
        dtype: Of a sample.
        bits_stored: Of a sample that count; the higher ones are something else.
        is_planar: All of a sample's values come before the next sample's.
        coding: RLE is DICOM's: PackBits for each byte of the samples.
        is_rgb: Colours are red, green and blue also in a JPEG that does not say what they are.
    """

    hw: tuple[int, int]
    samples: int
    dtype: np.dtype[Any]
    bits_stored: int
    is_planar: bool
    coding: Coding
    is_rgb: bool

    @property
    def frame_bytes(self) -> int:
        """Of a frame that is not compressed."""
        height, width = self.hw
        return height * width * self.samples * self.dtype.itemsize


class DicomPlane(PartedPlane):
    """A plane; any number of threads may read it.

    Args:
        data: The file.
        places: Where each frame begins in it, and its bytes; row by row.
        first: Number of the first frame.
        hw: Height and width of the plane.
        layout: How the frames are stored.
    """

    def __init__(
        self,
        data: FileRanges,
        places: Sequence[tuple[int, int]],
        first: int,
        hw: tuple[int, int],
        layout: FrameLayout,
    ) -> None:
        super().__init__(hw, layout.samples, layout.dtype, layout.hw)
        self._data, self._places, self._first, self._layout = data, places, first, layout

    def decode_part(self, index: int) -> Samples:
        """As `PartedPlane.decode_part`; a frame is never left out."""
        frame, name = self._data.read(*self._places[index]), f"frame {self._first + index}"
        match self._layout.coding:
            case "plain":
                return self._keep_stored(self._shape(np.frombuffer(frame, self.dtype)))
            case "rle":
                return self._keep_stored(self._decode_rle(frame, name))
            case "jpeg":
                return self._decode_jpeg(frame, name)
            case "jpeg2000":
                return self._decode_jpeg2000(frame, name)

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

    def _decode_rle(self, frame: bytes, name: str) -> NDArray[Any]:
        """Segments of a byte of a sample each, the highest byte of the first sample first."""
        layout = self._layout
        if len(frame) < _RLE_HEADER_BYTES:
            raise CorruptImage(f"{name} of the DICOM has {len(frame)} bytes")
        count, *offsets = struct.unpack_from("<16I", frame)
        size = layout.dtype.itemsize
        if count != layout.samples * size:
            raise CorruptImage(
                f"{name} of the DICOM has {count} RLE segments, not {layout.samples * size}"
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
                    f"RLE segment {number} of {name} of the DICOM is damaged"
                ) from error
            values = np.frombuffer(content, np.uint8).reshape(height, width)
            pixels[:, :, sample, size - 1 - byte] = values
        return pixels.view(layout.dtype)[..., 0]

    def _decode_jpeg(self, frame: bytes, name: str) -> NDArray[Any]:
        layout = self._layout
        hw = jpeg.read_hw(frame)
        jpeg.check_scans(frame)
        if hw != layout.hw:
            raise CorruptImage(f"{name} of the DICOM is a JPEG of {hw[1]}x{hw[0]} px")
        if layout.is_rgb and _ADOBE not in frame[:_ADOBE_WITHIN]:
            frame = frame[:2] + _ADOBE_RGB + frame[2:]
        try:
            pixels = simplejpeg.decode_jpeg(frame, "GRAY" if layout.samples == 1 else "RGB")
        except ValueError as error:
            raise CorruptImage(f"{name} of the DICOM is damaged: {error}") from error
        return np.asarray(pixels).reshape(*hw, layout.samples)

    def _decode_jpeg2000(self, frame: bytes, name: str) -> NDArray[Any]:
        layout, found = self._layout, jpeg2000.read_jp2(frame).codestream
        expected = (*layout.hw, layout.samples, layout.dtype.newbyteorder("="))
        if (found.height, found.width, found.components, found.dtype) != expected:
            raise CorruptImage(
                f"{name} of the DICOM is a JPEG 2000 of {found.width}x{found.height} px with "
                f"{found.components} samples of type {found.dtype}"
            )
        return jpeg2000.decode(frame, found)


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
