"""The orientation in EXIF data."""

from __future__ import annotations

import struct

_TAG = 0x0112
_SHORT = 3
_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}


def read_orientation(exif: bytes) -> int:
    """The orientation 1..8 in the first directory; 1 if there is none or EXIF is damaged.

    Args:
        exif: EXIF data from its TIFF header on; no other directory is read.
    """
    order = _BYTE_ORDERS.get(exif[:4])
    if order is None or len(exif) < 10:
        return 1
    (offset,) = struct.unpack_from(f"{order}I", exif, 4)
    if offset + 2 > len(exif):
        return 1
    (count,) = struct.unpack_from(f"{order}H", exif, offset)
    entries = exif[offset + 2 : offset + 2 + 12 * count]
    whole = len(entries) // 12 * 12
    for tag, kind, values, value in struct.iter_unpack(f"{order}HHIHxx", entries[:whole]):
        if tag == _TAG:
            return value if (kind, values) == (_SHORT, 1) and 1 <= value <= 8 else 1
    return 1
