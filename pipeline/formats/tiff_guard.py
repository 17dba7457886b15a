"""Bounds what a TIFF's directories make a reader do, before tifffile reads them.

A directory (IFD) is a list of entries and the position of the next one; a page is one directory.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

import numpy as np

from pipeline.errors import CorruptImage

MAX_PAGES = 20_000
MAX_ENTRIES = 4096
"""Of one directory."""
MAX_VALUES = 1 << 22
"""Numbers in the entries of all directories together; tifffile makes a Python object of each."""
MAX_TEXT_BYTES = 1 << 24
"""Of one entry of bytes or text."""
_BYTE_KINDS = (1, 2, 6, 7)
_ENTRY_CLASSIC, _ENTRY_BIG = 12, 20


def count_pages(file: BinaryIO, size: int, *, wide_links: bool = False) -> int:
    """Follows the chain of directories.

    Args:
        file: The TIFF; its position is changed.
        size: Its bytes.
        wide_links: Links to the next directory have 8 bytes in a classic TIFF, as in NDPI.

    Returns:
        The number of pages.

    Raises:
        CorruptImage: The chain has a loop, leaves the file, or exceeds a bound.
    """
    file.seek(0)
    head = file.read(16)
    order = "<" if head[:2] == b"II" else ">"
    is_big = head[2:4] in (b"+\0", b"\0+")
    start_format = f"{order}Q" if is_big or wide_links else f"{order}I"
    try:
        (position,) = struct.unpack_from(start_format, head, 8 if is_big else 4)
    except struct.error as error:
        raise CorruptImage(f"the TIFF ends within its header, after {len(head)} bytes") from error
    seen: set[int] = set()
    values = 0
    while position:
        if len(seen) == MAX_PAGES:
            raise CorruptImage(f"the TIFF has more than {MAX_PAGES} pages")
        if position in seen:
            raise CorruptImage(f"the TIFF's pages form a loop: page {len(seen)} is an earlier one")
        seen.add(position)
        found, position = _read_directory(
            file, position, size, len(seen) - 1, order, is_big, start_format
        )
        values += found
        if values > MAX_VALUES:
            raise CorruptImage(f"the TIFF's directories have more than {MAX_VALUES} numbers")
    if not seen:
        raise CorruptImage("the TIFF has no pages")
    return len(seen)


def _read_directory(
    file: BinaryIO, position: int, size: int, page: int, order: str, is_big: bool, link: str
) -> tuple[int, int]:
    """Numbers in the entries of a directory, and the position of the next directory."""
    where = f"page {page} of the TIFF, at byte {position} of {size},"
    file.seek(min(position, size))
    count_format = f"{order}{'Q' if is_big else 'H'}"
    entry_bytes = _ENTRY_BIG if is_big else _ENTRY_CLASSIC
    start = file.read(struct.calcsize(count_format))
    if len(start) < struct.calcsize(count_format):
        raise CorruptImage(f"{where} is outside the file")
    (count,) = struct.unpack(count_format, start)
    if count > MAX_ENTRIES:
        raise CorruptImage(f"{where} has {count} entries, more than {MAX_ENTRIES}")
    data = file.read(count * entry_bytes)
    if len(data) < count * entry_bytes:
        raise CorruptImage(f"{where} is truncated")
    kinds, counts = _split_entries(data, order, is_big)
    is_text = np.isin(kinds, _BYTE_KINDS)
    if (counts[is_text] > MAX_TEXT_BYTES).any():
        raise CorruptImage(f"{where} has an entry of more than {MAX_TEXT_BYTES} bytes")
    numbers = int(np.minimum(counts[~is_text], MAX_VALUES + 1).sum())
    after = file.read(struct.calcsize(link))
    if not after.strip(b"\0"):  # some writers omit the last link
        return numbers, 0
    if len(after) < struct.calcsize(link):
        raise CorruptImage(f"{where} is truncated")
    return numbers, struct.unpack(link, after)[0]


def _split_entries(
    data: bytes, order: str, is_big: bool
) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Types and counts of a directory's entries."""
    number = np.dtype(f"{order}u{8 if is_big else 4}")
    fields = [("tag", f"{order}u2"), ("kind", f"{order}u2"), ("count", number), ("value", number)]
    entries = np.frombuffer(data, np.dtype(fields))
    counts = np.minimum(entries["count"].astype(np.uint64), np.uint64(2**62)).astype(np.int64)
    return entries["kind"].astype(np.int64), counts
