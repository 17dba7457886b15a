"""LZW and PackBits by libtiff, as Pillow calls it: imagecodecs crashes on damaged LZW."""

from __future__ import annotations

import io
import struct

from PIL.TiffImagePlugin import TiffImageFile

LZW, PACKBITS = 5, 32773


def decompress(data: bytes, compression: int, size: int) -> bytes:
    """The content of a strip or tile.

    Args:
        data: The compressed bytes.
        compression: `LZW` or `PACKBITS`.
        size: Bytes of the content.

    Raises:
        OSError: It is damaged, or has fewer bytes.
    """
    tags = [(256, size), (257, 1), (258, 8), (259, compression), (262, 1), (273, 0), (277, 1)]
    tags += [(278, 1), (279, len(data))]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = [struct.pack("<HHII", tag, 4, 1, start if tag == 273 else v) for tag, v in tags]
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(entries) + bytes(4)
    with TiffImageFile(io.BytesIO(head + data)) as image:
        image.load()
        return image.tobytes()
