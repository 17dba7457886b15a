"""Image files byte by byte: kinds that no library writes, and damaged ones."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_HEADER_END = 33
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PASSES = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2)]

# 16x8 px, the left half 50 and the right half 200, by libjpeg's cjpeg -arithmetic.
ARITHMETIC_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEB"
    "AQEBAQEBAQEBAQEBAQEBAQEBAQH/yQALCAAIABABAREA/8wABgAQEAX/2gAIAQEAAD8A/wD2kXp4QP/Z"
)
# 32x16 px of (200, 60, 60), one sample of colour for 4x2 px, by cjpeg -sample 4x2.
JPEG_410 = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywt"
    "QFdBRkxOUlNSMj5aYVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09P"
    "T09PT09PT09PT09PT09PT09PT0//wAARCAAQACADAUIAAhEBAxEB/8QAFQABAQAAAAAAAAAAAAAAAAAAAAX/xAAUEAEA"
    "AAAAAAAAAAAAAAAAAAAA/8QAFQEBAQAAAAAAAAAAAAAAAAAABAb/xAAUEQEAAAAAAAAAAAAAAAAAAAAA/9oADAMBAAIR"
    "AxEAPwCeAAAqh//Z"
)


def encode(image: Image.Image | NDArray[np.uint8], kind: str, **options: Any) -> bytes:
    """A file as Pillow writes it."""
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def insert(data: bytes, position: int, extra: bytes) -> bytes:
    """A file with bytes put in."""
    return data[:position] + extra + data[position:]


def build_exif(orientation: int, order: str = "<", kind: int = 3, count: int = 1) -> bytes:
    """EXIF data whose only entry is the orientation."""
    start = b"II*\0" if order == "<" else b"MM\0*"
    value = struct.pack(f"{order}{'HH' if kind == 3 else 'I'}", *[orientation, 0][: 3 - kind // 2])
    entry = struct.pack(f"{order}HHI", 0x112, kind, count) + value
    return start + struct.pack(f"{order}IH", 8, 1) + entry + bytes(4)


def jpeg_segment(marker: int, body: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


def png_chunk(kind: bytes, body: bytes, *, is_damaged: bool = False) -> bytes:
    checksum = zlib.crc32(kind + body) ^ is_damaged
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def pack_bits(values: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """Rows [h, n] of values of 1, 2, 4 or 8 bits as bytes, the first value in the highest bits."""
    per = 8 // bits
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % per)))
    shifts = np.arange(8 - bits, -1, -bits)
    return np.asarray((padded.reshape(len(values), -1, per) << shifts).sum(axis=2), np.uint8)


def _pack_scanlines(samples: NDArray[np.int64], depth: int) -> bytes:
    flat = samples.reshape(len(samples), -1)
    rows = flat.astype(">u2").view(np.uint8) if depth == 16 else pack_bits(flat, depth)
    return b"".join(b"\0" + row.tobytes() for row in rows)


def build_png(
    samples: NDArray[np.int64],
    colour: int,
    depth: int,
    *,
    is_interlaced: bool = False,
    before: bytes = b"",
    chunk_bytes: int = 1 << 20,
    missing_bytes: int = 0,
) -> bytes:
    """A PNG of samples [h, w, channels], with chunks before its pixels.

    The last `missing_bytes` of the pixels are left out.
    """
    height, width = samples.shape[:2]
    parts = [samples]
    if is_interlaced:
        parts = [samples[y::dy, x::dx] for x, y, dx, dy in [*_PASSES, (0, 1, 1, 2)]]
    scanlines = b"".join(_pack_scanlines(p, depth) for p in parts if p.size)
    stream = zlib.compress(scanlines[: len(scanlines) - missing_bytes])
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(is_interlaced))
    pixels = [stream[i : i + chunk_bytes] for i in range(0, len(stream), chunk_bytes)]
    return b"".join(
        [
            PNG_SIGNATURE,
            png_chunk(b"IHDR", header),
            before,
            *(png_chunk(b"IDAT", part) for part in pixels),
            png_chunk(b"IEND", b""),
        ]
    )


def riff_chunk(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


def build_webp(*chunks: bytes) -> bytes:
    content = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(content)) + content


def webp_canvas(width: int, height: int, flags: int) -> bytes:
    """Chunk VP8X; flags: 2 animation, 8 EXIF, 16 alpha."""
    return riff_chunk(b"VP8X", bytes([flags, 0, 0, 0]) + _u24(width - 1) + _u24(height - 1))


def webp_frame(x: int, y: int, width: int, height: int, picture: bytes) -> bytes:
    """Chunk ANMF."""
    sides = _u24(x // 2) + _u24(y // 2) + _u24(width - 1) + _u24(height - 1)
    return riff_chunk(b"ANMF", sides + _u24(100) + b"\0" + picture)


def _u24(value: int) -> bytes:
    return value.to_bytes(3, "little")


def build_bmp(
    rows: NDArray[np.uint8] | bytes,
    width: int,
    height: int,
    bits: int,
    *,
    header_bytes: int = 40,
    compression: int = 0,
    masks: Sequence[int] = (),
    palette: NDArray[np.uint8] | None = None,
    colours: int = 0,
    is_top_down: bool = False,
) -> bytes:
    """A BMP of packed rows [h, bytes] from the top, or of data as it is to be in the file."""
    if isinstance(rows, bytes):
        data = rows
    else:
        padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4)))
        data = (padded if is_top_down else padded[::-1]).tobytes()
    packed_masks = struct.pack(f"<{len(masks)}I", *masks)
    if header_bytes == 12:
        header = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        shown = -height if is_top_down else height
        header = struct.pack("<IiiHH", header_bytes, width, shown, 1, bits)
        header += struct.pack("<IIiiII", compression, len(data), 0, 0, colours, 0)
        header += packed_masks if header_bytes > 40 else b""
        header = header[:header_bytes].ljust(header_bytes, b"\0")
        header += packed_masks if header_bytes == 40 else b""
    if palette is not None:
        padding = b"" if header_bytes == 12 else b"\0"
        header += b"".join(bytes(colour[::-1]) + padding for colour in palette)
    offset = 14 + len(header)
    return struct.pack("<2sIII", b"BM", offset + len(data), 0, offset) + header + data
