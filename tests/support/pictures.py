"""Bad and unusual image files, as bytes."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image

from tests.support.blob_model import draw_picture, encode_picture


def build_png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and has almost no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def build_gif() -> bytes:
    """A small GIF."""
    buffer = io.BytesIO()
    Image.fromarray(draw_picture()).save(buffer, "GIF")
    return buffer.getvalue()


def build_truncated_jpeg() -> bytes:
    """The first half of a JPEG."""
    data = encode_picture(draw_picture(200, 200), "JPEG")
    return data[: len(data) // 2]


def build_jpeg_of_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan, a few bytes, comes again and again.

    Decoders go over the whole picture once for each.
    """
    buffer = io.BytesIO()
    Image.new("L", (side, side), 128).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    start = data.rindex(b"\xff\xda")
    scan = data[start:-2]
    return data[:-2] + scan * scans + data[-2:]
