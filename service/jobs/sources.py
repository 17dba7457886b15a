"""Files that jobs name by URI: only those under the roots of the settings are listed and read."""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.formats.zarr_zip import ROOT_FILES
from service.errors import (
    BodyTooLarge,
    InvalidParameter,
    JobsUnavailable,
    ServiceError,
    SourceBusy,
    SourceForbidden,
    SourceUnavailable,
    StartupError,
)
from service.jobs import zarr_folder
from service.jobs.errors import describe, may_pass
from service.jobs.files import (
    LocalFile,
    as_local,
    as_text,
    find_in_store,
    has_settings,
    is_uri,
)
from service.jobs.inputs import find_files
from service.jobs.listing import Listing
from service.jobs.records import JobFile

_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


@dataclass(frozen=True)
class StoreRoot:
    """A part of an object store.

    Attributes:
        uri: "s3://bucket/prefix", without a slash at the end.
        settings: Of the store, "?region=..." or empty; a client cannot give any.
    """

    uri: str
    settings: str

    def holds(self, uri: str) -> bool:
        """Whether a URI is the root's or below it."""
        return uri == self.uri or uri.startswith(f"{self.uri}/")


class Sources:
    """The allowed roots.

    Args:
        roots: Absolute paths of folders, and URIs such as s3://bucket/prefix, comma-separated.
        max_bytes: Largest file that is read.

    Raises:
        StartupError: A root is neither.
    """

    def __init__(self, roots: str, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._folders: list[str] = []
        self._stores: list[StoreRoot] = []
        for root in filter(None, map(str.strip, roots.split(","))):
            local = as_local(root)
            if is_uri(local):
                uri, mark, settings = local.partition("?")
                self._stores.append(StoreRoot(uri.rstrip("/"), mark + settings))
            elif os.path.isabs(local):
                self._folders.append(os.path.realpath(local))
            else:
                raise StartupError(f"jobs_roots: {root!r} is neither an absolute path nor a URI")

    def list_files(self, inputs: Sequence[str]) -> tuple[list[JobFile], Listing]:
        """The images of file:// and store URIs: files, folders and globs.

        Returns:
            The files, named by their paths below the deepest folder that holds all, and the
            listing, which knows what was left out.

        Raises:
            SourceForbidden: One is not under a root.
            InvalidParameter: One is no URI, or names no image.
            JobsUnavailable: A store does not answer, or cannot at the moment.
            SourceUnavailable: A store cannot be read.
        """
        allowed = [self._check(given) for given in inputs]
        try:
            listing = find_files(allowed, is_allowed=self._is_below)
        except StartupError as error:
            raise InvalidParameter(f"inputs: {error}") from error
        except Exception as error:  # those of stores have no common base
            kind = JobsUnavailable if may_pass(error) else SourceUnavailable
            raise kind(f"inputs: {describe(error)}") from error
        if listing.unreadable:
            name, why = next(iter(listing.unreadable.items()))
            raise SourceUnavailable(f"inputs: {name!r} cannot be read: {why}")
        files = [
            JobFile(
                as_text(listing.name_of(file)),
                Path(file.path).as_uri() if isinstance(file, LocalFile) else file.uri,
            )
            for file in listing.files
        ]
        return files, listing

    def _check(self, given: str) -> str:
        """An input as `find_files` takes it."""
        if not is_uri(given):
            raise InvalidParameter(f"inputs: {given!r} is not a URI such as file:///folder")
        try:
            local = as_local(given)
        except StartupError as error:
            raise InvalidParameter(f"inputs: {error}") from error
        if "\0" in local:
            raise InvalidParameter(f"inputs: {given!r} has a zero byte")
        if is_uri(local):
            if has_settings(given):
                raise SourceForbidden(f"inputs: {given!r} has settings of a store")
            return given + self._find_store(given).settings
        fixed = Path(local)
        while glob.has_magic(str(fixed)) and not os.path.lexists(fixed):
            fixed = fixed.parent
        if not self._is_below(str(fixed)):
            raise SourceForbidden(f"inputs: {given!r} is not in a folder that jobs may read")
        return local

    def _is_below(self, path: str) -> bool:
        return self._find_folder(os.path.realpath(path)) is not None

    def _find_folder(self, real: str) -> str | None:
        """The root that holds a path without links."""
        return next((r for r in self._folders if os.path.commonpath((r, real)) == r), None)

    def _find_store(self, uri: str) -> StoreRoot:
        root = next((root for root in self._stores if root.holds(uri)), None)
        if root is None or ".." in PurePosixPath(uri).parts:
            raise SourceForbidden(f"{uri!r} is not in a store that jobs may read")
        return root

    def read(self, source: str) -> bytes:
        """The content of a file that was listed; the roots are checked again.

        Raises:
            SourceForbidden: It is no longer under a root.
            SourceBusy: It cannot be read now, but perhaps later.
            SourceUnavailable: It cannot be read.
            BodyTooLarge: It has too many bytes.
        """
        try:
            local = as_local(source)
            data = self._read_store(source) if is_uri(local) else self._read_local(local)
        except ServiceError:
            raise
        except Exception as error:  # those of stores have no common base
            kind = SourceBusy if may_pass(error) else SourceUnavailable
            raise kind(f"the file cannot be read: {describe(error)}") from error
        return data

    def _read_local(self, path: str) -> bytes:
        """Opens each folder below the root by itself, so that no link can take its place."""
        real = os.path.realpath(path)
        root = self._find_folder(real)
        if root is None:
            raise SourceForbidden(f"{path!r} is not in a folder that jobs may read")
        *folders, name = os.path.relpath(real, root).split(os.sep)
        folder = os.open(root, _FOLDER)
        try:
            for part in folders:
                inner = os.open(part, _FOLDER | _NO_LINK, dir_fd=folder)
                os.close(folder)
                folder = inner
            nonblock = getattr(os, "O_NONBLOCK", 0)  # a pipe would wait for a writer
            file = os.open(name, os.O_RDONLY | _NO_LINK | nonblock, dir_fd=folder)
        finally:
            os.close(folder)
        if stat.S_ISDIR(os.fstat(file).st_mode):
            return self._read_folder(file)
        with open(file, "rb") as opened:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "it is not a regular file")
            self._check_size(status.st_size)
            data = opened.read(self._max_bytes + 1)
        self._check_size(len(data))
        return data

    def _read_folder(self, folder: int) -> bytes:
        """A Zarr as a ZIP; the open folder is closed."""
        try:
            if not set(ROOT_FILES) & set(os.listdir(folder)):
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
            data = zarr_folder.pack(".", self._max_bytes, folder)
        finally:
            os.close(folder)
        self._check_size(len(data))
        return data

    def _read_store(self, uri: str) -> bytes:
        file = find_in_store(uri, self._find_store(uri).settings)
        self._check_size(file.read_stamp()[0])
        data = file.read(self._max_bytes + 1)
        self._check_size(len(data))
        return data

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise BodyTooLarge(f"the file has {size} bytes, the limit is {self._max_bytes}")
