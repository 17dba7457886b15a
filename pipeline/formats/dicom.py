"""DICOM as a stack of frames: grey or RGB, uncompressed or in DICOM's RLE; pydicom parses it."""

from __future__ import annotations

import io
import logging
import struct
import warnings
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from pipeline.errors import CorruptImage, DecodeError, UnsupportedFormat
from pipeline.formats.base import FileRanges
from pipeline.formats.dicom_plane import DicomPlane, FrameLayout, find_frames, find_items
from pipeline.formats.pixel_size import combine
from pipeline.formats.planes import Stack

if TYPE_CHECKING:
    from pydicom import Dataset

EXTRA = "science"
MAX_FRAMES = 20_000
MAX_HEADER_BYTES = 1 << 21
MAX_ITEMS = 50_000
"""Of sequences before the pixels; pydicom makes an object of each."""
_START = 132
_ITEM = b"\xfe\xff\x00\xe0"
_IMPLICIT, _EXPLICIT, _RLE = (f"1.2.840.10008.1.2{end}" for end in ("", ".1", ".5"))
_PHOTOMETRICS = {"MONOCHROME1": 1, "MONOCHROME2": 1, "RGB": 3}
"""Samples of a pixel by the photometric interpretations that are read."""
_META_END, _FIRST_PIXELS, _PIXELS = 0x00030000, 0x7FE00008, 0x7FE00010
_TAGS = {
    "TransferSyntaxUID": 0x00020010,
    "SamplesPerPixel": 0x00280002,
    "PhotometricInterpretation": 0x00280004,
    "PlanarConfiguration": 0x00280006,
    "NumberOfFrames": 0x00280008,
    "Rows": 0x00280010,
    "Columns": 0x00280011,
    "PixelSpacing": 0x00280030,
    "BitsAllocated": 0x00280100,
    "BitsStored": 0x00280101,
    "HighBit": 0x00280102,
    "PixelRepresentation": 0x00280103,
    "TotalPixelMatrixColumns": 0x00480006,
    "SharedFunctionalGroupsSequence": 0x52009229,
}


def is_dicom(data: bytes) -> bool:
    """Whether a file begins as DICOM, with its preamble."""
    return data[128:_START] == b"DICM"


class DicomStack:
    """The frames of a file, which count as planes along z.

    Args:
        file: The file; it stays open, and belongs to the stack.
        size: Its bytes.

    Attributes:
        height, width: Of the frames.
        stack: Axes and samples.
        um_per_px: Size of a pixel, if it is stated.
        orientation, palette, has_alpha: As those of a `TiffStack`; DICOM has none of them.
        is_inverted: 0 is white.
        bits: Of a sample that count.

    Raises:
        DecodeError: The file is damaged, or of a kind that is not read.
    """

    orientation = 1
    palette = None
    has_alpha = False

    def __init__(self, file: BinaryIO, size: int) -> None:
        data = FileRanges(file, size)
        syntax, header, position = _read_header(data.read(0, MAX_HEADER_BYTES))
        photometric = str(_find(header, "PhotometricInterpretation") or "")
        if not photometric:
            raise UnsupportedFormat("a DICOM without an image is not read")
        samples = _read_number(header, "SamplesPerPixel", 1)
        if _PHOTOMETRICS.get(photometric) != samples:
            raise UnsupportedFormat(
                f"a DICOM with {samples} samples of kind {photometric!r} is not read; "
                f"{', '.join(_PHOTOMETRICS)} are"
            )
        self.height, self.width = (_read_number(header, side) for side in ("Rows", "Columns"))
        if not (self.height and self.width):
            raise CorruptImage(f"the DICOM is {self.width}x{self.height} px by its header")
        if _read_number(header, "TotalPixelMatrixColumns", 0) > self.width:
            raise UnsupportedFormat("a DICOM whose frames are tiles of a slide is not read")
        frames = _read_number(header, "NumberOfFrames", 1)
        if not 1 <= frames <= MAX_FRAMES:
            raise CorruptImage(f"the DICOM has {frames} frames, not 1..{MAX_FRAMES}")
        self.is_inverted = photometric == "MONOCHROME1"
        self.stack = Stack({"Z": frames} if frames > 1 else {}, samples, is_colour=samples == 3)
        self.um_per_px = _read_um_per_px(header)
        dtype = _choose_dtype(header)
        self.bits = _read_number(header, "BitsStored", 8 * dtype.itemsize)
        self._data = data
        self._layout = FrameLayout(
            hw=(self.height, self.width),
            samples=samples,
            dtype=dtype,
            bits_stored=self.bits,
            is_planar=_read_number(header, "PlanarConfiguration", 0) == 1,
            is_rle=syntax == _RLE,
        )
        start, length = _locate_pixels(data, position, is_implicit=syntax == _IMPLICIT)
        if (length is None) != self._layout.is_rle:
            raise CorruptImage(f"the DICOM's pixels have length {length} in the syntax {syntax}")
        self._frames = (
            find_items(data, start, frames)
            if length is None
            else find_frames(data, start, length, frames, self._layout.frame_bytes)
        )

    def plane(self, index: int) -> DicomPlane:
        """A frame."""
        return DicomPlane(self._data, self._frames[index], self._layout, f"frame {index}")


def _read_header(start: bytes) -> tuple[str, Dataset, int]:
    """The transfer syntax, the elements of `_TAGS`, and where the element of the pixels begins."""
    try:
        from pydicom.filereader import read_dataset
        from pydicom.uid import UID
    except ImportError as error:
        raise UnsupportedFormat(
            f"DICOM files are read only with the extra '{EXTRA}' of solo-serve ({error})"
        ) from error
    # Damaged files would fill the log.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module="pydicom")
    if start.count(_ITEM) > MAX_ITEMS:
        raise CorruptImage(f"the DICOM has more than {MAX_ITEMS} items before its pixels")
    file = io.BytesIO(start)
    file.seek(_START)
    tags: Any = list(_TAGS.values())
    try:
        meta = read_dataset(
            file, False, True, stop_when=lambda tag, *_: tag >= _META_END, specific_tags=tags
        )
        syntax = str(_find(meta, "TransferSyntaxUID") or "")
        if syntax not in (_IMPLICIT, _EXPLICIT, _RLE):
            raise UnsupportedFormat(
                f"a DICOM of the transfer syntax {UID(syntax).name or 'none'!r} is not read; "
                "uncompressed little-endian ones and RLE Lossless are"
            )
        header = read_dataset(
            file,
            syntax == _IMPLICIT,
            True,
            stop_when=lambda tag, *_: tag >= _FIRST_PIXELS,
            specific_tags=tags,
        )
    except DecodeError:
        raise
    except Exception as error:  # of any kind
        raise CorruptImage(f"the DICOM is damaged: {error}") from error
    return syntax, header, file.tell()


def _locate_pixels(data: FileRanges, position: int, *, is_implicit: bool) -> tuple[int, int | None]:
    """Where the value of the element of the pixels begins, and its length; None if it has none."""
    head = data.read(position, min(12, MAX_HEADER_BYTES - position))
    try:
        group, element, length = struct.unpack_from("<HHI", head)
        if not is_implicit:
            (length,) = struct.unpack_from("<I", head, 8)
    except struct.error as error:
        raise CorruptImage(
            f"the DICOM has no pixels within its first {min(data.size, MAX_HEADER_BYTES)} bytes"
        ) from error
    tag = group << 16 | element
    if tag != _PIXELS:
        raise UnsupportedFormat(f"a DICOM whose pixels are in the element {tag:08X} is not read")
    start = position + (8 if is_implicit else 12)
    return start, None if length == 0xFFFFFFFF else length


def _find(header: Dataset, name: str) -> Any:
    """The value of an element; None if it is absent or empty."""
    try:
        element = header.get(_TAGS[name])
        return None if element is None else element.value
    except Exception as error:  # of any kind
        raise CorruptImage(f"the DICOM's {name} is damaged: {error}") from error


def _read_number(header: Dataset, name: str, default: int | None = None) -> int:
    value = _find(header, name)
    if value is None and default is not None:
        return default
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise CorruptImage(f"the DICOM has {name} {value!r}, not a number") from error


def _choose_dtype(header: Dataset) -> np.dtype[Any]:
    allocated = _read_number(header, "BitsAllocated")
    stored = _read_number(header, "BitsStored", allocated)
    high = _read_number(header, "HighBit", stored - 1)
    if allocated not in (8, 16, 32) or not 1 <= stored <= allocated or high != stored - 1:
        raise UnsupportedFormat(
            f"a DICOM with {stored} bits stored in {allocated}, the highest at {high}, is not read"
        )
    kind = "i" if _read_number(header, "PixelRepresentation", 0) else "u"
    return np.dtype(f"<{kind}{allocated // 8}")


def _read_um_per_px(header: Dataset) -> float | None:
    """By PixelSpacing, of which files of several frames have one for all."""
    spacing = _find(header, "PixelSpacing")
    if spacing is None:
        try:
            groups = header[_TAGS["SharedFunctionalGroupsSequence"]].value[0]
            spacing = groups.PixelMeasuresSequence[0].PixelSpacing
        except Exception:  # of any kind: it is not stated
            return None
    try:
        row_mm, column_mm = map(float, spacing)
    except (TypeError, ValueError):
        return None
    return combine(column_mm * 1000, row_mm * 1000)
