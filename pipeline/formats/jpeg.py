"""JPEG: its segments up to the first scan; libjpeg decodes."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import simplejpeg
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from pipeline.errors import CorruptImage, DecodeError, UnsupportedFormat
from pipeline.formats.base import DAMAGE, EncodedImage
from pipeline.formats.convert import to_rgb
from pipeline.formats.exif import read_orientation
from pipeline.model_config import ContrastSpec
from pipeline.types import UInt8

MAX_SEGMENTS = 10_000
MAX_SCANS = 50
"""A decoder goes over the whole picture for each scan, which can be ten bytes long: a file of 30 KB
can take minutes. Encoders write about ten."""
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
"""The others are stuffed bytes, fill bytes and restarts within a scan."""
_WINDOW_BYTES = 256 * 1024
"""Searched by one call, during which no other thread of Python runs."""
_BARE_MARKERS = (0x01, 0xD8)
"""Markers that no length follows."""
_END, _SCAN, _EXIF = 0xD9, 0xDA, 0xE1
_EXIF_START = b"Exif\0"
"""A byte of padding follows."""
_NOT_DECODED = frozenset([*range(0xE1, 0xEE), 0xEF, 0xFE])
"""Segments without influence on the pixels: all applications' but JFIF's and Adobe's, comments."""
_ARITHMETIC = "arithmetic coding"
_CODINGS = {
    0xC0: "baseline",
    0xC1: "extended sequential",
    0xC2: "progressive",
    0xC3: "lossless",
    0xC5: "hierarchical",
    0xC6: "hierarchical progressive",
    0xC7: "hierarchical lossless",
    0xC9: f"sequential with {_ARITHMETIC}",
    0xCA: f"progressive with {_ARITHMETIC}",
    0xCB: f"lossless with {_ARITHMETIC}",
    0xCD: f"hierarchical with {_ARITHMETIC}",
    0xCE: f"hierarchical progressive with {_ARITHMETIC}",
    0xCF: f"hierarchical lossless with {_ARITHMETIC}",
}
"""What the marker of the frame header says; height and width follow it."""
_ORDINARY = ("baseline", "extended sequential", "progressive")

Segment = tuple[int, int, int]
"""The marker; where its length begins; where the segment ends."""


@dataclass(frozen=True)
class Jpeg(EncodedImage):
    """A JPEG; of several pictures in one file the first.

    Attributes:
        coding: Name of the kind of JPEG.
        bits: Of a sample.
        components: Colour components.
        tables: What the pixels depend on before the first scan.
        scan: Where the first scan begins.
    """

    coding: str
    bits: int
    components: int
    tables: bytes = field(repr=False)
    scan: int

    def _decode(self, least_hw: tuple[int, int], contrast: ContrastSpec | None) -> UInt8:
        check_scans(self.data)
        pixels = self._decode_fast(least_hw)
        if pixels is not None:
            return pixels
        try:
            with JpegImageFile(io.BytesIO(self.tables + self.data[self.scan :])) as image:
                image.load()
                if image.size != (self.width, self.height):
                    raise CorruptImage(f"the JPEG has a second size, {image.width}x{image.height}")
                return to_rgb(image)
        except DecodeError:
            raise
        except DAMAGE as error:
            if self.coding in _ORDINARY and self.bits == 8 and self.components in (1, 3, 4):
                raise
            raise UnsupportedFormat(
                f"the JPEG is {self.coding} with {self.components} components of {self.bits} bits, "
                "which cannot be decoded"
            ) from error

    def _decode_fast(self, least_hw: tuple[int, int]) -> UInt8 | None:
        """The same pixels as Pillow's in a fraction of its time.

        Returns:
            None for what is left to Pillow: codings that only it reads, and warnings.

        Raises:
            CorruptImage: Pixels are missing, of which Pillow does not tell if the file has an end.
        """
        height, width = least_hw
        reduce = 0 < 2 * height <= self.height and 0 < 2 * width <= self.width
        limits = {"min_height": height, "min_width": width, "min_factor": 2} if reduce else {}
        colours = "CMYK" if self.components == 4 else "RGB"
        try:
            pixels = np.asarray(simplejpeg.decode_jpeg(self.data, colours, **limits), np.uint8)
        except ValueError as error:
            if "premature end" in str(error).lower():
                raise CorruptImage(f"the JPEG is truncated: {error}") from error
            return None
        if not reduce and pixels.shape[:2] != (self.height, self.width):
            return None
        if colours == "CMYK":  # Adobe's programs store it inverted, and all others do as they do
            np.invert(pixels, out=pixels)
            size = pixels.shape[1::-1]
            return to_rgb(Image.frombuffer("CMYK", size, pixels, "raw", "CMYK", 0, 1))
        return pixels


def read_hw(data: bytes, *, max_segments: int = MAX_SEGMENTS) -> tuple[int, int]:
    """Height and width that the frame header declares."""
    for marker, start, end in _segments(data, max_segments):
        if marker in _CODINGS:
            return _read_frame(data[start:end])[1:3]
        if marker == _SCAN:
            break
    raise CorruptImage("the JPEG has no frame header before its first scan or its end")


def open_file(data: bytes) -> Jpeg:
    """Reads everything up to the first scan."""
    coding, frame = "", (0, 0, 0, 0)
    orientation, kept, scan = None, [data[:2]], 0
    for marker, start, end in _segments(data, MAX_SEGMENTS):
        if marker == _SCAN:
            scan = start - 2
            break
        if marker in _CODINGS and not coding:
            coding, frame = _CODINGS[marker], _read_frame(data[start:end])
        elif marker == _EXIF and orientation is None:
            segment = data[start + 2 : end]
            if segment.startswith(_EXIF_START):
                orientation = read_orientation(segment[len(_EXIF_START) + 1 :])
        if marker not in _NOT_DECODED:
            kept.append(data[start - 2 : end])
    else:
        raise CorruptImage("the JPEG ends before its first scan")
    bits, height, width, components = frame
    if not coding:
        raise CorruptImage("the JPEG has a scan before its frame header")
    tables = b"".join(kept)
    return Jpeg(data, height, width, orientation or 1, coding, bits, components, tables, scan)


def _read_frame(segment: bytes) -> tuple[int, int, int, int]:
    """Bits of a sample, height, width, components."""
    if len(segment) < 8:
        raise CorruptImage(f"the JPEG's frame header has {len(segment)} bytes")
    bits, height, width, components = struct.unpack_from(">BHHB", segment, 2)
    return bits, height, width, components


def _segments(data: bytes, max_segments: int) -> Iterator[Segment]:
    """The segments up to the end of the picture, or to damage.

    Raises:
        CorruptImage: There are more than `max_segments`.
    """
    position = 2
    for _ in range(max_segments):
        found = _find_marker(data, position)
        if found is None or found[1][0] == _END:
            return
        position = found.end()
        if found[1][0] in _BARE_MARKERS:
            continue
        length = int.from_bytes(data[position : position + 2], "big")
        if length < 2 or position + length > len(data):
            return
        yield found[1][0], position, position + length
        position += length
    raise CorruptImage(f"the JPEG has more than {max_segments} segments")


def _find_marker(data: bytes, position: int) -> re.Match[bytes] | None:
    for start in range(position, len(data), _WINDOW_BYTES):
        found = _MARKER.search(data, start, start + _WINDOW_BYTES + 1)  # a marker has two bytes
        if found is not None:
            return found
    return None


def check_scans(data: bytes) -> None:
    """Refuses a JPEG of more scans than an honest encoder writes."""
    scans = 0
    for marker, _, _ in _segments(data, MAX_SEGMENTS):
        scans += marker == _SCAN
        if scans > MAX_SCANS:
            raise CorruptImage(f"the JPEG has more than {MAX_SCANS} scans")
