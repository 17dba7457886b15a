"""Image files: of this machine, or of an object store that pyarrow or fsspec knows."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import unquote

from service.errors import StartupError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_URI = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[^/]*)/?(?P<path>.*)", re.DOTALL)
_QUERY = re.compile(r"\?\w+=[^&?/]*(&\w+=[^&?/]*)*$")
"""Settings of the store at the end of a URI; any other question mark belongs to a glob."""
_MAGIC = re.compile(r"[*?[]")


@dataclass(frozen=True)
class RemoteFile:
    """A file that a URI names.

    Attributes:
        uri: Its name, without the store's settings.
        root: URI of its store, with them: "s3://bucket/?region=eu-west-1".
        path: In the store.
        stamp: Size in bytes and time of modification in ns when it was listed.
    """

    uri: str
    root: str = field(repr=False)
    path: str = field(repr=False)
    stamp: tuple[int, int] = field(repr=False)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return PurePosixPath(self.path).name

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return PurePosixPath(self.path).stem

    def __str__(self) -> str:
        return self.uri


ImageFile = Path | RemoteFile


def is_uri(text: str) -> bool:
    """Whether an input names a store and is no path."""
    return _URI.fullmatch(text) is not None


def as_text(file: ImageFile | str) -> str:
    """A name for JSON and for people; bytes of it that are no UTF-8 are escaped."""
    return os.fsencode(str(file)).decode("utf-8", "backslashreplace")


def key_of(file: ImageFile) -> str:
    """What tells a file from all others."""
    return as_text(file.absolute() if isinstance(file, Path) else file)


def stamp_of(file: ImageFile) -> list[int]:
    """Tells a changed file: size in bytes, time of modification in ns.

    Raises:
        OSError: It is gone.
    """
    if isinstance(file, RemoteFile):
        return list(file.stamp)
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def read_file(file: ImageFile) -> bytes:
    """A file's bytes.

    Raises:
        OSError: It is gone or its store does not answer.
    """
    if isinstance(file, Path):
        return file.read_bytes()
    store, _ = _open_store(file.root)
    with store.open_input_stream(file.path, compression=None) as stream:
        data: bytes = stream.read()
    return data


@cache
def _open_store(root: str) -> tuple[FileSystem, str]:
    """The store and the path that its URI stands for."""
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem
    except ImportError as error:
        raise StartupError(f"{root} needs pyarrow: pip install 'solo-serve[ray]'") from error
    try:
        store, base = FileSystem.from_uri(root)
    except ArrowInvalid as unknown:
        from fsspec.core import url_to_fs

        try:
            other, base = url_to_fs(root)
        except (ImportError, ValueError, TypeError) as error:
            raise StartupError(f"{root}: {unknown}; fsspec: {error}") from error
        store = PyFileSystem(FSSpecHandler(other))
    return store, base.rstrip("/")


def list_store(uri: str) -> list[RemoteFile]:
    """The image that a URI names, the images below it, or what it matches as a glob; in order.

    Raises:
        StartupError: No such kind of store, or a URI with a password.
        OSError: The store does not answer.
    """
    query = _QUERY.search(uri)
    settings = query[0] if query else ""
    parts = _URI.fullmatch(uri.removesuffix(settings))
    assert parts is not None, uri
    scheme, host, inner = parts["scheme"], parts["host"], parts["path"]
    if ":" in host.rpartition("@")[0]:
        raise StartupError(
            f"{scheme}://...@{host.rpartition('@')[2]}: a password in a URI would be written into "
            "journals; give it as the store's environment variables or files"
        )
    root = f"{scheme}://{host}/{settings}"
    store, base = _open_store(root)
    if scheme == "file":
        inner = unquote(inner)
    start = f"{base}/{inner}".rstrip("/")
    found = _find(store, start)
    return [
        RemoteFile(f"{scheme}://{host}/{path.removeprefix(base).lstrip('/')}", root, path, stamp)
        for path, stamp in sorted(found.items(), key=lambda item: PurePosixPath(item[0]))
    ]


def _find(store: FileSystem, start: str) -> dict[str, tuple[int, int]]:
    """Stamps of files by path."""
    from fsspec.utils import glob_translate
    from pyarrow.fs import FileSelector, FileType

    info = store.get_file_info(start)
    if info.type == FileType.File:
        return {info.path: (info.size, info.mtime_ns or 0)}
    folder, wanted = start, re.compile("")
    if info.type == FileType.NotFound and (magic := _MAGIC.search(start)):
        folder = start[: start.rfind("/", 0, magic.start())]
        wanted = re.compile(glob_translate(start))
    below = store.get_file_info(FileSelector(folder, allow_not_found=True, recursive=True))
    return {
        info.path: (info.size, info.mtime_ns or 0)
        for info in below
        if info.type == FileType.File
        and wanted.match(info.path)
        and (wanted.pattern or PurePosixPath(info.path).suffix.lower() in SUFFIXES)
    }
