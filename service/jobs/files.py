"""Image files: local, or in an object store that pyarrow or fsspec supports."""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import unquote
from urllib.request import url2pathname

from service.errors import StartupError
from service.jobs import zarr_folder
from service.jobs.patterns import EVERYTHING, Pattern

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

_URI = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[^/]*)/?(?P<path>.*)", re.DOTALL)
_QUERY = re.compile(r"\?\w+=[^&?/]*(&\w+=[^&?/]*)*$")
"""Settings of the store at the end of a URI; any other question mark is part of a glob."""
_UNPRINTABLE = ("Cc", "Cf", "Zl", "Zp")
"""Unicode categories: controls, invisible formatting, line and paragraph separators."""

ATTEMPTS = 3
"""Of a request to S3 that fails in a way that may pass."""

LeaveOut = Callable[[str, str], None]
"""Takes the name of an entry that is left out, and the reason."""


def as_text(name: object) -> str:
    """A name for JSON; bytes that are not UTF-8 are escaped."""
    text = str(name)
    try:
        data = os.fsencode(text)
    except UnicodeEncodeError:  # not from a file system
        data = text.encode("utf-8", "backslashreplace")
    return data.decode("utf-8", "backslashreplace")


def as_line(text: object) -> str:
    """A name or a reason for a message: one line, without control characters."""
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in _UNPRINTABLE else c
        for c in as_text(text)
    )


@dataclass(frozen=True, slots=True)
class InputFolder:
    """A local folder, which the files that are found in it share.

    Attributes:
        given: As it was given; empty for the current folder.
        absolute: Its path wherever the process runs; `..` and links are kept.
        address: The normalised absolute path, with slashes and without one at the end.
    """

    given: str
    absolute: str
    address: str


def build_folder(given: str) -> InputFolder:
    """The folder of a path that was given.

    Raises:
        OSError: The current folder does not exist.
    """
    path = Path(given)
    absolute = path.absolute()
    address = Path(os.path.normpath(absolute)).as_posix().rstrip("/")
    return InputFolder("" if path == Path() else str(path), str(absolute), address)


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file of this machine, or a folder that is a Zarr.

    Attributes:
        folder: The folder where it was found.
        below: Its path in that folder, with slashes.
    """

    folder: InputFolder
    below: str

    @property
    def path(self) -> str:
        """Absolute path."""
        return os.path.join(self.folder.absolute, self.below)

    @property
    def address(self) -> str:
        """Normalised absolute path, with slashes."""
        return f"{self.folder.address}/{self.below}"

    @property
    def key(self) -> str:
        """A unique name: the absolute path, or its URI if it is not UTF-8."""
        path = self.path
        try:
            path.encode()
        except UnicodeEncodeError:
            return Path(path).as_uri()
        return path

    @property
    def stem(self) -> str:
        """Name without its suffix."""
        return PurePosixPath(self.below).stem

    def read_stamp(self) -> list[int]:
        """Size in bytes and modification time in ns; differs when the file was changed.

        Raises:
            OSError: It does not exist, or is a folder but no Zarr, a pipe or a device.
        """
        status = os.stat(self.path)
        if self.is_zarr:
            return zarr_folder.read_stamp(self.path)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        return [status.st_size, status.st_mtime_ns]

    @property
    def is_zarr(self) -> bool:
        """Whether it is a folder that is a Zarr."""
        return os.path.isdir(self.path) and zarr_folder.is_zarr(self.path)

    def read(self) -> bytes:
        """The content; of a Zarr as a ZIP.

        Raises:
            OSError: It cannot be read.
        """
        if self.is_zarr:
            return zarr_folder.pack(self.path, sys.maxsize)
        with open(self.path, "rb") as file:
            return file.read()

    def __str__(self) -> str:
        return os.path.join(self.folder.given, self.below)


@dataclass(frozen=True, slots=True)
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
    def address(self) -> str:
        """URI without the store's settings."""
        return self.uri

    @property
    def key(self) -> str:
        """A unique name."""
        return as_text(self.uri)

    @property
    def stem(self) -> str:
        """Name without its suffix."""
        return PurePosixPath(self.path).stem

    def read_stamp(self) -> list[int]:
        """Size in bytes and modification time in ns when it was listed."""
        return list(self.stamp)

    def read(self, most: int | None = None) -> bytes:
        """The content, or that many bytes of it.

        Raises:
            Exception: The store's own, if it cannot be read.
        """
        store, _ = _open_store(self.root)
        with store.open_input_stream(self.path, compression=None) as stream:
            data: bytes = stream.read(most)
        return data

    def __str__(self) -> str:
        return self.uri


ImageFile = LocalFile | RemoteFile


def has_settings(uri: str) -> bool:
    """Whether a URI ends with settings of its store, "?name=value"."""
    return _QUERY.search(uri) is not None


def without_settings(uri: str) -> str:
    """A URI for messages."""
    return _QUERY.sub("", uri)


def is_uri(text: str) -> bool:
    """Whether an input is the URI of a store, not a local path."""
    return _URI.fullmatch(text) is not None


def as_local(text: str) -> str:
    """The local path that a `file://` URI stands for; any other input as it is.

    Raises:
        StartupError: The URI names another host.
    """
    parts = _URI.fullmatch(text)
    if parts is None or parts["scheme"] != "file":
        return text
    if parts["host"] not in ("", "localhost"):
        raise StartupError(f"{text!r} names the host {parts['host']!r}: write file:///PATH")
    path = f"/{parts['path']}"
    return url2pathname(path) if os.name == "nt" else unquote(path, errors="surrogateescape")


@cache
def _open_store(root: str) -> tuple[FileSystem, str]:
    """The store, and the path in it that the URI stands for."""
    name = without_settings(root)
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem
    except ImportError as error:
        raise StartupError(f"{name} requires pyarrow, in the extra 's3' of solo-serve") from error
    try:
        store, base = FileSystem.from_uri(root)
    except ArrowInvalid as unknown:
        from fsspec.core import url_to_fs

        try:
            other, base = url_to_fs(root)
        except (ImportError, ValueError, TypeError) as error:
            raise StartupError(f"{name}: {unknown}; fsspec: {error}") from error
        store = PyFileSystem(FSSpecHandler(other))
    return _limit_attempts(store), base.rstrip("/")


def _limit_attempts(store: FileSystem) -> FileSystem:
    """The store, whose calls take seconds where it does not answer; by default S3's take minutes.

    While a call is in progress the process cannot end.
    """
    if store.type_name != "s3":
        return store
    from pyarrow.fs import AwsStandardS3RetryStrategy

    build, (options,) = store.__reduce__()
    strategy = AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS)
    limited: FileSystem = build({**options, "retry_strategy": strategy})
    return limited


def list_store(uri: str, leave_out: LeaveOut) -> tuple[str, list[RemoteFile]]:
    """The file that a URI names, the images below it, or its matches as a glob.

    Args:
        uri: URI of a file or folder, or a glob.
        leave_out: Called for each entry that is left out.

    Returns:
        The URI of the folder that was searched, and the files.

    Raises:
        StartupError: The kind of store is unknown, or the URI has a password.
        OSError: The store cannot be read.
    """
    query = _QUERY.search(uri)
    settings = query[0] if query else ""
    scheme, host, path = _split(uri.removesuffix(settings))
    if ":" in host.rpartition("@")[0]:
        raise StartupError(
            f"{scheme}://...@{host.rpartition('@')[2]}: a password in a URI would be written into "
            "journals; give it as the store's environment variables or files"
        )
    root = f"{scheme}://{host}/{settings}"
    store, base = _open_store(root)

    def uri_of(path: str) -> str:
        return f"{scheme}://{host}/{path.removeprefix(base).lstrip('/')}"

    folder, found = _find(
        store,
        f"{base}/{path}".rstrip("/"),
        lambda path, reason: leave_out(uri_of(path), reason),
    )
    return uri_of(folder), [
        RemoteFile(uri_of(info.path), root, info.path, (info.size, info.mtime_ns or 0))
        for info in found
    ]


def find_in_store(uri: str, settings: str) -> RemoteFile:
    """The file that a URI, whatever characters it has, names.

    Args:
        uri: URI without settings of the store.
        settings: Those, "?region=..." or empty.

    Raises:
        FileNotFoundError: There is none.
        Exception: The store's own, if it cannot be read.
    """
    scheme, host, path = _split(uri)
    root = f"{scheme}://{host}/{settings}"
    store, base = _open_store(root)
    info = store.get_file_info(f"{base}/{path}")
    if not info.is_file:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    return RemoteFile(uri, root, info.path, (info.size, info.mtime_ns or 0))


def _split(uri: str) -> tuple[str, str, str]:
    """Scheme, host and path."""
    parts = _URI.fullmatch(uri)
    assert parts is not None, uri
    return parts["scheme"], parts["host"], parts["path"]


def _find(store: FileSystem, start: str, leave_out: LeaveOut) -> tuple[str, list[FileInfo]]:
    """The folder that was searched, and the files that `start` names in it."""
    from pyarrow.fs import FileSelector, FileType

    info = store.get_file_info(start)
    if info.type == FileType.File:
        return start.rpartition("/")[0], [info]
    folder, pattern = start, EVERYTHING
    if info.type == FileType.NotFound and glob.has_magic(start):
        fixed, pattern = Pattern.split(start.split("/"))
        folder = "/".join(fixed)
    below = store.get_file_info(FileSelector(folder, allow_not_found=True, recursive=True))
    return folder, [
        info
        for info in below
        if info.type == FileType.File
        and _accepts(pattern, info.path, info.path.removeprefix(folder), leave_out)
    ]


def _accepts(pattern: Pattern, path: str, below: str, leave_out: LeaveOut) -> bool:
    """Whether a file in a store is an image of the run."""
    states, reason = pattern.start, None
    *folders, name = below.strip("/").split("/")
    for part in (*folders, name):
        reason = reason or pattern.refuse_name(states, part)
        states = pattern.step(states, part)
    if not pattern.accepts(states):
        return False
    reason = reason or pattern.refuse_file(name)
    if reason is not None:
        leave_out(path, reason)
    return reason is None
