"""Image files: local, or in an object store that pyarrow or fsspec supports."""

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
"""Settings of the store at the end of a URI; any other question mark is part of a glob."""
_MAGIC = re.compile(r"[*?[]")


@dataclass(frozen=True)
class RemoteFile:
    """A file in an object store.

    Attributes:
        uri: URI without the store's settings.
        root: URI of the store with its settings: "s3://bucket/?region=eu-west-1".
        path: Path in the store.
        stamp: Size in bytes and modification time in ns when it was listed.
    """

    uri: str
    root: str = field(repr=False)
    path: str = field(repr=False)
    stamp: tuple[int, int] = field(repr=False)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return PurePosixPath(self.path).name

    @property
    def stem(self) -> str:
        """Name without its suffix."""
        return PurePosixPath(self.path).stem

    def __str__(self) -> str:
        return self.uri


ImageFile = Path | RemoteFile


def is_uri(text: str) -> bool:
    """Whether an input is a URI, not a local path."""
    return _URI.fullmatch(text) is not None


def as_text(file: ImageFile | str) -> str:
    """A name for JSON and messages; bytes that are not UTF-8 are escaped."""
    return os.fsencode(str(file)).decode("utf-8", "backslashreplace")


def key_of(file: ImageFile) -> str:
    """A unique name of a file: absolute path or URI."""
    return as_text(file.absolute() if isinstance(file, Path) else file)


def stamp_of(file: ImageFile) -> list[int]:
    """Size in bytes and modification time in ns; differs when the file was changed.

    Raises:
        OSError: The file does not exist.
    """
    if isinstance(file, RemoteFile):
        return list(file.stamp)
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def read_file(file: ImageFile) -> bytes:
    """The content of a file.

    Raises:
        OSError: It does not exist, or its store cannot be read.
    """
    if isinstance(file, Path):
        return file.read_bytes()
    store, _ = _open_store(file.root)
    with store.open_input_stream(file.path, compression=None) as stream:
        data: bytes = stream.read()
    return data


@cache
def _open_store(root: str) -> tuple[FileSystem, str]:
    """The store, and the path in it that the URI stands for."""
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
    """The file that a URI names, the images below it, or its matches as a glob; sorted.

    Raises:
        StartupError: The kind of store is unknown, or the URI has a password.
        OSError: The store cannot be read.
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
    """Stamps of the files by path."""
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
