"""A Zarr on the disk: a folder that counts as one image file."""

from __future__ import annotations

import errno
import io
import os
import stat
import zipfile
from collections.abc import Iterator
from functools import partial

from pipeline.formats.zarr_zip import ROOT_FILES, check_length

_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
_NO_DATE = (1980, 1, 1, 0, 0, 0)
SUFFIX = ".zarr"


def is_zarr(path: str) -> bool:
    """Whether a folder is a Zarr, by the files in it."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ROOT_FILES)


def is_named_zarr(path: str) -> bool:
    """Whether a folder is a Zarr also by its name, as those that are found are."""
    return path.lower().endswith(SUFFIX) and is_zarr(path)


class FolderFiles:
    """The files of a Zarr; see `pipeline.formats.zarr_zip.ZarrFiles`.

    Args:
        path: The folder.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def has(self, key: str) -> bool:
        """As `ZarrFiles.has`."""
        return os.path.isfile(os.path.join(self._path, key))

    def read(self, key: str, part: slice, most: int) -> bytes | None:
        """As `ZarrFiles.read`.

        Raises:
            OSError: The file cannot be read.
        """
        try:
            with open(os.path.join(self._path, key), "rb", opener=_open) as file:
                start, stop, _ = part.indices(os.fstat(file.fileno()).st_size)
                check_length(stop - start, most, key)
                file.seek(start)
                return file.read(stop - start)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None


def _open(path: str, flags: int, dir_fd: int | None = None) -> int:
    """Opens a regular file; a pipe is not waited for.

    Raises:
        OSError: It is none.
    """
    opened = os.open(path, flags | _NO_WAIT, dir_fd=dir_fd)
    mode = os.fstat(opened).st_mode
    if stat.S_ISREG(mode):
        return opened
    os.close(opened)
    number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise OSError(number, f"{path} in the Zarr is no regular file")


def _open_no_link(path: str, flags: int, dir_fd: int) -> int:
    return _open(path, flags | getattr(os, "O_NOFOLLOW", 0), dir_fd)


def read_stamp(path: str) -> list[int]:
    """Bytes of all files of a Zarr, and the time of the latest change in ns.

    Raises:
        OSError: A folder of it cannot be read.
    """
    size, changed_ns = 0, 0
    for _, status in _walk(path):
        size += status.st_size
        changed_ns = max(changed_ns, status.st_mtime_ns)
    return [size, changed_ns]


def _walk(path: str) -> Iterator[tuple[str, os.stat_result]]:
    """All files below a folder, and their status."""
    for entry in os.scandir(path):
        if entry.is_dir():
            yield from _walk(entry.path)
        else:
            yield entry.path, entry.stat()


def pack(path: str, most: int, dir_fd: int | None = None) -> bytes:
    """A Zarr as a ZIP that is not compressed.

    Args:
        path: The folder.
        most: Bytes of the files together; of more only about as many are read.
        dir_fd: The open folder that the path begins in.

    Returns:
        The ZIP; it has more than `most` bytes if the Zarr has.

    Raises:
        OSError: A file cannot be read, or is a link.
    """
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        for below, folders, files, opened in os.fwalk(path, dir_fd=dir_fd, onerror=_raise):
            for name in folders:
                if stat.S_ISLNK(os.stat(name, dir_fd=opened, follow_symlinks=False).st_mode):
                    raise OSError(errno.ELOOP, f"{name} in the Zarr is a link")
            for name in sorted(files):
                if archive.tell() > most:
                    return archive.getvalue()
                with open(name, "rb", opener=partial(_open_no_link, dir_fd=opened)) as file:
                    size = os.fstat(file.fileno()).st_size
                    data = file.read(min(size, most) + 1)
                place = os.path.relpath(os.path.join(below, name), path)
                writer.writestr(zipfile.ZipInfo(place, _NO_DATE), data)
    return archive.getvalue()


def _raise(error: OSError) -> None:
    raise error
