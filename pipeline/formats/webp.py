"""WebP: its first frame without metadata; libwebp decodes, called by OpenCV."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import cv2
import numpy as np

from pipeline.errors import CorruptImage
from pipeline.formats.base import MAX_CHUNKS, EncodedImage
from pipeline.formats.convert import draw_on_black
from pipeline.formats.exif import read_orientation
from pipeline.model_config import ContrastSpec
from pipeline.types import UInt8

_BITSTREAMS = (b"VP8 ", b"VP8L")
_ALPHA_FLAG = 0x10
_SIZES_DIFFER = "the WebP's picture of {}x{} px is not that of its canvas (height, width): {}"


@dataclass(frozen=True)
class _Frame:
    """A still picture.

    Attributes:
        height, width: As its bitstream says.
        has_alpha: It may be transparent.
        file: A whole WebP of this frame.
    """

    height: int
    width: int
    has_alpha: bool
    file: bytes = field(repr=False)


@dataclass(frozen=True)
class Webp(EncodedImage):
    """A WebP; of an animation the first frame.

    Attributes:
        frame: What is drawn.
        place: Row and column of the canvas at which the frame begins.
    """

    frame: _Frame
    place: tuple[int, int]

    def _decode(self, least_hw: tuple[int, int], contrast: ContrastSpec | None) -> UInt8:
        frame = self.frame
        flags = cv2.IMREAD_UNCHANGED if frame.has_alpha else cv2.IMREAD_COLOR_RGB
        decoded = cv2.imdecode(np.frombuffer(frame.file, np.uint8), flags)
        channels = 4 if frame.has_alpha else 3
        if decoded is None or decoded.shape != (frame.height, frame.width, channels):
            raise CorruptImage("the WebP is damaged or truncated")
        pixels = np.asarray(decoded, np.uint8)
        if frame.has_alpha:
            cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA, dst=pixels)
            pixels = draw_on_black(pixels)
        if pixels.shape[:2] == (self.height, self.width):
            return pixels
        canvas = np.zeros((self.height, self.width, 3), np.uint8)
        y, x = self.place
        canvas[y : y + frame.height, x : x + frame.width] = pixels
        return canvas


def read_hw(data: bytes, *, max_segments: int = MAX_CHUNKS) -> tuple[int, int]:
    """Height and width that the first chunk declares."""
    for kind, body in _chunks(data[:64], 12, check=False):
        return _read_canvas(body) if kind == b"VP8X" else _read_bitstream(kind, body)[:2]
    raise CorruptImage(f"the WebP ends within its header, after {len(data)} bytes")


def open_file(data: bytes) -> Webp:
    """Reads all chunks, but of metadata only the orientation."""
    canvas: tuple[int, int] | None = None
    frame: _Frame | None = None
    is_opaque, alpha, place, orientation = False, b"", (0, 0), 1
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        raise CorruptImage(f"the WebP is truncated: {len(data)} bytes of {end}")
    for kind, body in _chunks(data[:end], 12):
        if kind == b"VP8X" and canvas is None:
            canvas, is_opaque = _read_canvas(body), not body[0] & _ALPHA_FLAG
        elif kind == b"EXIF":
            orientation = read_orientation(body.removeprefix(b"Exif\0\0"))
        elif frame is not None:
            continue
        elif kind == b"ALPH":
            alpha = body
        elif kind in _BITSTREAMS:
            frame = _build_frame(kind, body, alpha, is_opaque)
            if canvas not in (None, (frame.height, frame.width)):
                raise CorruptImage(_SIZES_DIFFER.format(frame.width, frame.height, canvas))
        elif kind == b"ANMF":
            frame, place = _read_animation_frame(body, is_opaque)
    if frame is None:
        raise CorruptImage("the WebP has no picture: it is damaged or truncated")
    height, width = canvas or (frame.height, frame.width)
    if place[0] + frame.height > height or place[1] + frame.width > width:
        raise CorruptImage(_SIZES_DIFFER.format(frame.width, frame.height, (height, width)))
    return Webp(data, height, width, orientation, frame, place)


def _chunks(data: bytes, start: int, *, check: bool = True) -> Iterator[tuple[bytes, bytes]]:
    """Kind and body of the chunks up to one that is cut, or yields that one too without `check`."""
    position = start
    for _ in range(MAX_CHUNKS):
        if position + 8 > len(data):
            return
        kind, length = struct.unpack_from("<4sI", data, position)
        end = position + 8 + length
        if check and end > len(data):
            return
        yield kind, data[position + 8 : end]
        position = end + length % 2
    raise CorruptImage(f"the WebP has more than {MAX_CHUNKS} chunks")


def _read_canvas(body: bytes) -> tuple[int, int]:
    """Height and width in a VP8X chunk."""
    if len(body) < 10:
        raise CorruptImage(f"the WebP's chunk VP8X has {len(body)} bytes, not 10")
    return int.from_bytes(body[7:10], "little") + 1, int.from_bytes(body[4:7], "little") + 1


def _read_bitstream(kind: bytes, body: bytes) -> tuple[int, int, bool]:
    """Height, width, and whether there is transparency within the bitstream."""
    if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a" and len(body) >= 10:
        width, height = struct.unpack_from("<HH", body, 6)
        return height & 0x3FFF, width & 0x3FFF, False
    if kind == b"VP8L" and body[:1] == b"\x2f" and len(body) >= 5:
        (bits,) = struct.unpack_from("<I", body, 1)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1, bool(bits >> 28 & 1)
    raise CorruptImage(f"the WebP's chunk {kind!r} of {len(body)} bytes does not start a picture")


def _build_frame(kind: bytes, body: bytes, alpha: bytes, is_opaque: bool) -> _Frame:
    height, width, has_alpha = _read_bitstream(kind, body)
    has_alpha = has_alpha and not is_opaque
    chunks = [(kind, body)]
    if alpha and kind == b"VP8 " and not is_opaque:
        has_alpha = True
        size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        header = bytes([_ALPHA_FLAG, 0, 0, 0]) + size
        chunks = [(b"VP8X", header), (b"ALPH", alpha), (kind, body)]
    content = b"".join(
        part
        for name, data in chunks
        for part in (name, struct.pack("<I", len(data)), data, b"\0" * (len(data) % 2))
    )
    file = b"".join([b"RIFF", struct.pack("<I", 4 + len(content)), b"WEBP", content])
    return _Frame(height, width, has_alpha, file)


def _read_animation_frame(body: bytes, is_opaque: bool) -> tuple[_Frame, tuple[int, int]]:
    """The frame in an ANMF chunk, and its row and column."""
    alpha = b""
    for kind, part in _chunks(body, 16):
        if kind == b"ALPH":
            alpha = part
        elif kind in _BITSTREAMS:
            x, y = (2 * int.from_bytes(body[i : i + 3], "little") for i in (0, 3))
            return _build_frame(kind, part, alpha, is_opaque), (y, x)
    raise CorruptImage("the WebP's first frame has no picture: it is damaged or truncated")
