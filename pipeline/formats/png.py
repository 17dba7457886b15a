"""PNG: its chunks without metadata, checked; Pillow decodes."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import cv2
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from pipeline.errors import CorruptImage
from pipeline.formats.base import MAX_CHUNKS, EncodedImage
from pipeline.formats.convert import stripes, to_rgb
from pipeline.formats.exif import read_orientation
from pipeline.model_config import ContrastSpec
from pipeline.types import UInt8

_SIGNATURE_BYTES, _HEADER_END = 8, 33
_END = b"\0\0\0\0IEND\xaeB`\x82"
_GREY, _RGB, _PALETTE = 0, 2, 3
_DEPTHS = {_GREY: (1, 2, 4, 8, 16), _RGB: (8, 16), _PALETTE: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Bit depths of each colour type."""
_SAMPLES = {_GREY: 1, _RGB: 3, _PALETTE: 1, 4: 2, 6: 4}
_TRANSPARENT_VALUES = {_GREY: 1, _RGB: 3}
_PASSES = (
    *((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2)),
    (1, 0, 2, 1),
)
"""First row and column, and distance of rows and columns, of the passes of an interlaced PNG."""
_INFLATED_BYTES = 1 << 20


@dataclass(frozen=True)
class Png(EncodedImage):
    """A PNG; of an animation the picture that viewers without animation show.

    Attributes:
        depth: Bits of a sample.
        samples: Of a pixel.
        is_interlaced: Its pixels are stored in seven passes.
        transparent: The grey value [1] or the colour [3] that means transparent, if any.
        essence: The file without metadata.
    """

    depth: int
    samples: int
    is_interlaced: bool
    transparent: tuple[int, ...]
    essence: bytes = field(repr=False)

    def _decode(self, least_hw: tuple[int, int], contrast: ContrastSpec | None) -> UInt8:
        with PngImageFile(io.BytesIO(self.essence)) as image:
            image.load()
            pixels = to_rgb(image)
            last_row = image.crop((0, self.height - 1, self.width, self.height))
            if self.is_interlaced or not np.asarray(last_row).any():
                self._check_length()
            if self.transparent:
                self._clear(pixels, image)
        return pixels

    def _check_length(self) -> None:
        """Counts the bytes of the pixels; Pillow leaves pixels 0 if there are too few."""
        bits = self.depth * self.samples
        passes = _PASSES if self.is_interlaced else [(0, 0, 1, 1)]
        sides = [
            (-(-(self.height - y) // dy), -(-(self.width - x) // dx)) for y, x, dy, dx in passes
        ]
        needed = sum(h * (1 + -(-w * bits // 8)) for h, w in sides if h > 0 and w > 0)
        stream, found = zlib.decompressobj(), 0
        for kind, start, end in _chunks(self.essence):
            part = self.essence[start + 8 : end - 4] if kind == b"IDAT" else b""
            while part and found < needed:
                found += len(stream.decompress(part, _INFLATED_BYTES))
                part = stream.unconsumed_tail
        if found < needed:
            raise CorruptImage(f"the PNG has {found} bytes of pixels, {needed} are needed")

    def _clear(self, pixels: UInt8, image: Image.Image) -> None:
        """Makes pixels [H, W, 3] of the transparent value black; Pillow compares scaled values."""
        value = np.array(self.transparent)
        if self.depth < 8:
            value = value * (255 // (2**self.depth - 1))
        if self.depth == 16 and len(value) == 3:  # of which Pillow keeps eight bits
            coded = np.frombuffer(self.essence, np.uint8)
            stored = cv2.imdecode(coded, cv2.IMREAD_UNCHANGED | cv2.IMREAD_ANYDEPTH)
            if stored is None or stored.shape != pixels.shape:
                raise CorruptImage("the PNG's 16-bit pixels are damaged")
            stored = stored[..., ::-1]
        else:
            stored = np.asarray(image.convert("L") if image.mode == "1" else image)
        stored = stored.reshape(*pixels.shape[:2], -1)
        for rows in stripes(self.height, self.width):
            pixels[rows][(stored[rows] == value).all(axis=2)] = 0


def read_hw(data: bytes, *, max_segments: int = MAX_CHUNKS) -> tuple[int, int]:
    """Height and width that the header declares."""
    return _read_header(data)[:2]


def _read_header(data: bytes) -> tuple[int, int, int, int, bool]:
    """Height, width, bits of a sample, colour type, and whether it is interlaced."""
    if len(data) < _HEADER_END:
        raise CorruptImage(f"the PNG ends within its header, after {len(data)} bytes")
    length, kind, width, height, depth, colour, *methods, checksum = struct.unpack_from(
        ">I4sIIBBBBBI", data, _SIGNATURE_BYTES
    )
    if (length, kind) != (13, b"IHDR"):
        raise CorruptImage(f"the PNG starts with a chunk {_name(kind)} of {length} bytes, not IHDR")
    if zlib.crc32(data[12:29]) != checksum:
        raise CorruptImage("the PNG's header (IHDR) has a wrong checksum")
    if depth not in _DEPTHS.get(colour, ()):
        raise CorruptImage(f"the PNG has colour type {colour} with {depth} bits, which is invalid")
    if methods[:2] != [0, 0] or methods[2] > 1:
        raise CorruptImage(
            f"the PNG's compression, filter and interlace methods are {methods}, which is invalid"
        )
    return height, width, depth, colour, bool(methods[2])


def open_file(data: bytes) -> Png:
    """Reads the chunks up to the last one of the pixels, but of metadata only the orientation."""
    height, width, depth, colour, is_interlaced = _read_header(data)
    has_palette = False
    orientation: int | None = None
    transparent: tuple[int, ...] = ()
    kept = [data[:_HEADER_END]]
    for kind, start, end in _chunks(data):
        body = data[start + 8 : end - 4]
        match kind:
            case b"IDAT":
                kept.append(data[start:end])
            case b"PLTE" if colour == _PALETTE:
                has_palette = True
                kept.append(data[start:end])
            case b"tRNS" if colour == _PALETTE:
                kept.append(data[start:end])
            case b"tRNS" if len(body) == 2 * _TRANSPARENT_VALUES.get(colour, 0):
                transparent = struct.unpack(f">{len(body) // 2}H", body)
            case b"eXIf" if orientation is None:
                orientation = read_orientation(body)
    if colour == _PALETTE and not has_palette:
        raise CorruptImage("the PNG has no palette (PLTE chunk) before its pixels")
    essence = b"".join([*kept, _END])
    samples = _SAMPLES[colour]
    return Png(
        data, height, width, orientation or 1, depth, samples, is_interlaced, transparent, essence
    )


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of the chunks that matter, with right checksums.

    As in browsers, other chunks are not looked into, and what follows the pixels does not count.

    Raises:
        CorruptImage: A chunk without which there is no picture is damaged or missing.
    """
    position, previous = _HEADER_END, b""
    for _ in range(MAX_CHUNKS):
        length, kind = struct.unpack(">I4s", data[position : position + 8].ljust(8, b"\0"))
        if previous == b"IDAT" and kind != b"IDAT":
            return
        start, position = position, position + 12 + length
        if position > len(data) or not kind.isalpha():
            raise CorruptImage(
                f"the PNG is damaged or truncated: at byte {start} of {len(data)} is a chunk "
                f"{_name(kind)} of {length} bytes"
            )
        is_critical = kind[:1].isupper()
        if is_critical and kind not in (b"IDAT", b"PLTE"):
            raise CorruptImage(f"the PNG has a chunk {_name(kind)} before any pixels (IDAT)")
        if is_critical or kind in (b"tRNS", b"eXIf"):
            checksum = int.from_bytes(data[position - 4 : position], "big")
            if zlib.crc32(memoryview(data)[start + 4 : position - 4]) == checksum:
                yield kind, start, position
            elif is_critical:
                raise CorruptImage(f"the PNG's chunk {_name(kind)} has a wrong checksum")
        previous = kind
    raise CorruptImage(f"the PNG has more than {MAX_CHUNKS} chunks")


def _name(kind: bytes) -> str:
    return kind.decode("ascii") if kind.isalpha() else kind.hex(" ")
