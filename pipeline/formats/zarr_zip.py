"""The files of a Zarr: by their paths in it, wherever they are stored; in a ZIP, here."""

from __future__ import annotations

import io
import struct
import threading
import zipfile
from typing import Any, BinaryIO, Protocol

from pipeline.errors import CorruptImage, DecodeError, UnsupportedFormat

MAX_DIRECTORY_BYTES = 1 << 23
"""Of the list of files in a ZIP, for each of which Python makes an object."""
_MORE = MAX_DIRECTORY_BYTES + 1
ROOT_FILES = ("zarr.json", ".zattrs", ".zgroup")
"""A folder that has one of these is a Zarr, or a part of one."""
_LOCAL_HEADER = "<4s22xHH"
_LOCAL_HEADER_BYTES = 30


class ZarrFiles(Protocol):
    """The files of a Zarr; any number of threads may read them."""

    def has(self, key: str) -> bool:
        """Whether there is a file of this path."""

    def read(self, key: str, part: slice, most: int) -> bytes | None:
        """A part of a file; None if there is none.

        Args:
            key: The path in the Zarr, with slashes; its parts are neither empty nor dots.
            part: Of the bytes.
            most: Bytes that the part may have.

        Raises:
            DecodeError: The part is larger, or damaged.
        """


def check_length(length: int, most: int, key: str) -> None:
    """Bounds what is read of a file.

    Raises:
        CorruptImage: Names the file.
    """
    if length > most:
        raise CorruptImage(f"{key} of the Zarr has {length} bytes, not up to {most}")


def is_zip(data: bytes) -> bool:
    """Whether a file begins as a ZIP."""
    return data.startswith(b"PK\x03\x04")


class ZipFiles:
    """The files of a Zarr in a ZIP: at its top, or in a folder of it.

    Args:
        file: The ZIP; it stays open, and belongs to this.

    Raises:
        CorruptImage: It is damaged, or has too many files.
        UnsupportedFormat: There is no Zarr in it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._lock = threading.Lock()
        try:
            bounded: Any = _BoundedFile(file)
            self._archive = zipfile.ZipFile(bounded)
        except DecodeError:
            raise
        except Exception as error:  # of any kind
            raise CorruptImage(f"the ZIP is damaged: {error}") from error
        self._infos = self._archive.NameToInfo
        found = [name for name in self._infos if name.rpartition("/")[2] in ROOT_FILES]
        if not found:
            raise UnsupportedFormat("ZIP files are read only if an OME-Zarr image is in them")
        first = min(found, key=lambda name: (name.count("/"), name))
        self._root = first[: len(first) - len(first.rpartition("/")[2])]

    def has(self, key: str) -> bool:
        """As `ZarrFiles.has`."""
        return self._root + key in self._infos

    def read(self, key: str, part: slice, most: int) -> bytes | None:
        """As `ZarrFiles.read`."""
        info = self._infos.get(self._root + key)
        if info is None:
            return None
        start, stop, _ = part.indices(info.file_size)
        check_length(stop - start, most, key)
        if info.flag_bits & 1 or info.compress_type not in (
            zipfile.ZIP_STORED,
            zipfile.ZIP_DEFLATED,
        ):
            raise UnsupportedFormat(
                f"{key} of the Zarr is encrypted or compressed by method {info.compress_type} in "
                "its ZIP; stored and deflated files are read"
            )
        if info.compress_type == zipfile.ZIP_STORED:
            return self._read_stored(info, start, stop - start, key)
        check_length(info.file_size, most, key)
        try:
            with self._lock, self._archive.open(info) as opened:
                return opened.read(info.file_size)[start:stop]
        except Exception as error:  # of any kind
            raise CorruptImage(f"{key} of the Zarr is damaged: {error}") from error

    def _read_stored(self, info: zipfile.ZipInfo, start: int, length: int, key: str) -> bytes:
        """Parts of shards are read without what comes before them."""
        with self._lock:
            head = self._read_at(info.header_offset, _LOCAL_HEADER_BYTES)
            if len(head) < _LOCAL_HEADER_BYTES or not is_zip(head):
                raise CorruptImage(f"{key} of the Zarr is damaged: it has no header in the ZIP")
            _, name_bytes, extra_bytes = struct.unpack(_LOCAL_HEADER, head)
            first = info.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
            data = self._read_at(first + start, length)
        if len(data) < length:
            raise CorruptImage(f"{key} of the Zarr is truncated")
        return data

    def _read_at(self, position: int, length: int) -> bytes:
        self._file.seek(position)
        return self._file.read(length)


class _BoundedFile(io.RawIOBase):
    """A file of which no more is read at once than a ZIP's list of files may have."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(position, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(min(size, _MORE) if size >= 0 else _MORE)
        if len(data) == _MORE:
            raise CorruptImage(f"the ZIP's list of files has more than {MAX_DIRECTORY_BYTES} bytes")
        return data
