"""DICOM as a stack of frames: grey or RGB, uncompressed or in DICOM's RLE; pydicom parses it."""

from __future__ import annotations

import io
import logging
import math
import struct
import warnings
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from pipeline.errors import CorruptImage, DecodeError, UnsupportedFormat
from pipeline.formats.base import FileRanges
from pipeline.formats.dicom_plane import (
    Coding,
    DicomPlane,
    FrameLayout,
    find_frames,
    find_items,
)
from pipeline.formats.parts import OpenPlanes, check_part_bytes
from pipeline.formats.pixel_size import combine
from pipeline.formats.planes import Stack

if TYPE_CHECKING:
    from pydicom import Dataset

EXTRA = "science"
MAX_FRAMES = 20_000
MAX_TILES = 250_000
"""Frames of a slide."""
MAX_HEADER_BYTES = 1 << 21
MAX_ITEMS = 50_000
"""Of sequences before the pixels; pydicom makes an object of each."""
_START = 132
_ITEM = b"\xfe\xff\x00\xe0"
_UID = "1.2.840.10008.1.2"
_IMPLICIT = _UID
_CODINGS: dict[str, Coding] = {
    _UID: "plain",
    f"{_UID}.1": "plain",
    f"{_UID}.5": "rle",
    f"{_UID}.4.50": "jpeg",
    f"{_UID}.4.90": "jpeg2000",
    f"{_UID}.4.91": "jpeg2000",
}
"""By the transfer syntaxes that are read."""
_GREYS, _RGB = ("MONOCHROME1", "MONOCHROME2"), "RGB"
_COLOURS = {"plain": (_RGB,), "rle": (_RGB,), "jpeg": (_RGB, "YBR_FULL", "YBR_FULL_422")} | {
    "jpeg2000": (_RGB, "YBR_ICT", "YBR_RCT")
}
"""Photometric interpretations of three samples that are read, by coding."""
_TILED_FULL = "TILED_FULL"
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
    "DimensionOrganizationType": 0x00209311,
    "TotalPixelMatrixColumns": 0x00480006,
    "TotalPixelMatrixRows": 0x00480007,
    "NumberOfOpticalPaths": 0x00480302,
    "TotalPixelMatrixFocalPlanes": 0x00480303,
    "SharedFunctionalGroupsSequence": 0x52009229,
}


def is_dicom(data: bytes) -> bool:
    """Whether a file begins as DICOM, with its preamble."""
    return data[128:_START] == b"DICM"


class DicomStack:
    """The frames of a file: planes along z, or the tiles of a slide.

    Args:
        file: The file; it stays open, and belongs to the stack.
        size: Its bytes.

    Attributes:
        height, width: Of the planes.
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
        self._data = FileRanges(file, size)
        syntax, header, position = _read_header(self._data.read(0, MAX_HEADER_BYTES))
        self._layout = _read_layout(header, _CODINGS[syntax])
        self.height, self.width = hw = _read_slide_hw(header, self._layout.hw)
        self._tiles = math.prod(
            -(-side // part) for side, part in zip(hw, self._layout.hw, strict=True)
        )
        frames, most = _read_number(header, "NumberOfFrames", 1), MAX_FRAMES
        if hw != self._layout.hw:
            most = MAX_TILES
            check_part_bytes(self._layout.frame_bytes, hw, "a frame of the DICOM")
        if not 1 <= frames <= most:
            raise CorruptImage(f"the DICOM has {frames} frames, not 1..{most}")
        if hw != self._layout.hw and frames != self._tiles:
            raise UnsupportedFormat(
                f"a slide in DICOM of {self.width}x{self.height} px with {frames} frames in place "
                f"of {self._tiles} is not read"
            )
        planes = frames // self._tiles
        self.is_inverted = _find(header, "PhotometricInterpretation") == "MONOCHROME1"
        samples = self._layout.samples
        self.stack = Stack({"Z": planes} if planes > 1 else {}, samples, is_colour=samples == 3)
        self.um_per_px = _read_um_per_px(header)
        self.bits = self._layout.bits_stored
        self._frames = self._find_frames(syntax, position, frames)
        self._planes = OpenPlanes(self._open_plane)

    def _find_frames(self, syntax: str, position: int, frames: int) -> list[tuple[int, int]]:
        data, layout = self._data, self._layout
        start, length = _locate_pixels(data, position, is_implicit=syntax == _IMPLICIT)
        if (length is None) != (layout.coding != "plain"):
            raise CorruptImage(f"the DICOM's pixels have length {length} in the syntax {syntax}")
        if length is None:
            return find_items(data, start, frames)
        return find_frames(data, start, length, frames, layout.frame_bytes)

    def plane(self, index: int) -> DicomPlane:
        """A plane; the last ones keep frames that they have decoded."""
        return self._planes.get(index)

    def _open_plane(self, index: int) -> DicomPlane:
        first = index * self._tiles
        places = self._frames[first : first + self._tiles]
        return DicomPlane(self._data, places, first, (self.height, self.width), self._layout)


def _read_layout(header: Dataset, coding: Coding) -> FrameLayout:
    photometric = str(_find(header, "PhotometricInterpretation") or "")
    if not photometric:
        raise UnsupportedFormat("a DICOM without an image is not read")
    samples = _read_number(header, "SamplesPerPixel", 1)
    if photometric not in {1: _GREYS, 3: _COLOURS[coding]}.get(samples, ()):
        raise UnsupportedFormat(
            f"a DICOM with {samples} samples of kind {photometric!r} is not read; "
            f"{', '.join((*_GREYS, *_COLOURS[coding]))} are"
        )
    height, width = (_read_number(header, side) for side in ("Rows", "Columns"))
    if height <= 0 or width <= 0:
        raise CorruptImage(f"the DICOM is {width}x{height} px by its header")
    dtype = _choose_dtype(header)
    if coding == "jpeg" and dtype != np.uint8:
        raise UnsupportedFormat(f"a DICOM with JPEG of type {dtype} is not read")
    return FrameLayout(
        hw=(height, width),
        samples=samples,
        dtype=dtype,
        bits_stored=_read_number(header, "BitsStored", 8 * dtype.itemsize),
        is_planar=_read_number(header, "PlanarConfiguration", 0) == 1,
        coding=coding,
        is_rgb=photometric == _RGB,
    )


def _read_slide_hw(header: Dataset, frame_hw: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a slide whose tiles are the frames; of other files those of a frame.

    Raises:
        CorruptImage: It is of no size.
        UnsupportedFormat: The tiles are not one complete grid.
    """
    height, width = (
        _read_number(header, f"TotalPixelMatrix{side}", 0) for side in ("Rows", "Columns")
    )
    if (height, width) in ((0, 0), frame_hw):
        return frame_hw
    if height <= 0 or width <= 0:
        raise CorruptImage(f"the slide in DICOM is {width}x{height} px by its header")
    organization = _find(header, "DimensionOrganizationType")
    paths = _read_number(header, "NumberOfOpticalPaths", 1)
    depth = _read_number(header, "TotalPixelMatrixFocalPlanes", 1)
    if organization != _TILED_FULL or paths != 1 or depth != 1:
        raise UnsupportedFormat(
            f"a slide in DICOM with tiles of the kind {organization or 'none'!s}, {paths} optical "
            f"paths and {depth} focal planes is not read; {_TILED_FULL} with one of each is"
        )
    return height, width


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
        if syntax not in _CODINGS:
            raise UnsupportedFormat(
                f"a DICOM of the transfer syntax {UID(syntax).name or 'none'!r} is not read; "
                "uncompressed little-endian ones, RLE Lossless, JPEG Baseline and JPEG 2000 are"
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
