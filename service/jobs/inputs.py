"""Finds the image files of a run: folders, globs, single files, lists of files and URIs."""

from __future__ import annotations

import glob
import os
import stat
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from service.errors import StartupError
from service.jobs.errors import describe
from service.jobs.files import (
    ImageFile,
    InputFolder,
    LocalFile,
    as_local,
    build_folder,
    is_uri,
    list_store,
    without_settings,
)
from service.jobs.listing import Listing
from service.jobs.patterns import EVERYTHING, Pattern, States
from service.jobs.pictures import is_picture
from service.jobs.zarr_folder import is_named_zarr, is_zarr

_MOST_DETAILS = 3
Identity = int | str
"""Of a file or folder, whatever its name."""


def _identify(path: str, status: os.stat_result | None) -> Identity:
    if status is None:
        return path
    if status.st_ino == 0:  # a file system without inodes
        return os.path.realpath(path)
    return status.st_dev << 64 | status.st_ino


def _read_status(
    path: str, read: Callable[[str], os.stat_result] = os.stat
) -> os.stat_result | None:
    """Status of a file; None if there is none, and reading the file will give the reason."""
    try:
        return read(path)
    except OSError:
        return None


class _Finder:
    """Lists the inputs one after the other; each file once.

    Args:
        own: Paths that the run writes, which are left out, and what they are.
        is_allowed: Whether a local path may be used, after its links are followed.
    """

    def __init__(
        self, own: Mapping[Path, str], is_allowed: Callable[[str], bool] | None = None
    ) -> None:
        self.listing = Listing()
        self.is_allowed = is_allowed or (lambda path: True)
        self._own: dict[Identity, str] = {}
        for path, what in own.items():
            if (status := _read_status(str(path))) is not None:
                self._own[_identify(str(path), status)] = what
        self._seen: set[Identity] = set()
        self._folders: dict[str, InputFolder] = {}
        self._new: list[ImageFile] = []
        self._matches = 0

    def add(self, given: str) -> None:
        """Adds a file, the images in a folder, or the matches of a glob.

        Raises:
            StartupError: There are none, or pictures would be written beside them.
            OSError: An object store cannot be read.
        """
        self._matches = 0
        local = as_local(given)
        if is_uri(local):
            self._add_store(local)
        else:
            self._add_local(local)
        if not self._matches:
            name = without_settings(local)
            raise self.refuse(f"{name!r} is not an image or a folder with images, and matches none")
        self._sort_in()

    def refuse(self, text: str) -> StartupError:
        """An error with some of the entries that are no images."""
        unreadable = [f"{name}: {why}" for name, why in self.listing.unreadable.items()]
        details = [*unreadable, *self.listing.describe_left_out()][:_MOST_DETAILS]
        return StartupError(f"{text} ({'; '.join(details)})" if details else text)

    def add_listed(self, names: Iterable[str]) -> None:
        """Adds the entries of a list; one that does not exist fails when it is read."""
        for name in names:
            local = as_local(name)
            if is_uri(local):
                self._matches = 0
                self._add_store(local)
                if not self._matches:
                    self.listing.unreadable[local] = "no such file"
                self._sort_in()
            elif (
                (status := _read_status(local)) is not None
                and stat.S_ISDIR(status.st_mode)
                and not is_zarr(local)
            ):
                self._add_folder(local, status)
                self._sort_in()
            else:
                self._add_file(local, status)
                self._keep_order()

    def _sort_in(self) -> None:
        """Adds what was found for an input, in the order of the paths' parts."""
        self._new.sort(key=lambda file: file.address.replace("/", "\0"))
        self._keep_order()

    def _keep_order(self) -> None:
        self.listing.files += self._new
        self._new.clear()

    def _add_local(self, given: str) -> None:
        try:
            status = os.stat(given)
        except OSError as error:
            if not glob.has_magic(given):
                raise StartupError(
                    f"{given!r} is not an image or a folder with images: {describe(error)}"
                ) from error
            fixed, pattern = Pattern.split(Path(given).parts)
            self._walk(str(Path(*fixed)), pattern)
            return
        if stat.S_ISDIR(status.st_mode) and not is_zarr(given):
            self._add_folder(given, status)
        elif stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode):
            self._add_file(given, status)
        else:
            raise StartupError(f"{given!r} is neither a file nor a folder")

    def _add_folder(self, given: str, status: os.stat_result) -> None:
        reason = self.refuse_folder(given, status)
        if reason is None:
            self._walk(given, EVERYTHING)
        else:  # where a shell expanded a wildcard
            self._matches += 1
            self.listing.leave_out(given, reason)

    def _add_file(self, given: str, status: os.stat_result | None) -> None:
        path = Path(given)
        file = LocalFile(self.open_folder(str(path.parent)), path.name)
        reason = self.take(file, status)
        if reason is not None:
            self.listing.leave_out(given, reason)

    def _add_store(self, uri: str) -> None:
        folder, found = list_store(uri, self.listing.leave_out)
        self.listing.cover(folder.removesuffix("/"))
        for file in found:
            self._matches += 1
            if file.uri not in self._seen:
                self._seen.add(file.uri)
                self._new.append(file)

    def _walk(self, given: str, pattern: Pattern) -> None:
        _Walk(self, self.open_folder(given), pattern).run()

    def open_folder(self, given: str) -> InputFolder:
        """A folder that has files of the run.

        Raises:
            StartupError: It is a folder that the run writes.
        """
        if given not in self._folders:
            folder = build_folder(given)
            identity = _identify(folder.absolute, _read_status(folder.absolute))
            if identity in self._own:
                raise StartupError(
                    f"this command would write into {folder.absolute!r}, among the images; give "
                    "--overlays and --out folders of their own"
                )
            self.listing.cover(folder.address)
            self._folders[given] = folder
        return self._folders[given]

    def refuse_folder(self, path: str, status: os.stat_result) -> str | None:
        """The reason why a folder of this identity is left out."""
        return self._own.get(_identify(path, status))

    def take(self, file: LocalFile, status: os.stat_result | None) -> str | None:
        """Adds a file; returns the reason if it is left out."""
        self._matches += 1
        identity = _identify(file.path, status)
        if identity in self._own:
            return self._own[identity]
        if identity in self._seen:
            return "listed already, by this or another name"
        if status is not None and stat.S_ISREG(status.st_mode) and is_picture(file.path):
            return "a picture with masks that solo-predict has drawn"
        self._seen.add(identity)
        self._new.append(file)
        return None


class _Walk:
    """Finds the files below a folder that match a pattern.

    Links are followed after everything else, so that a file keeps the name of its own folder. A
    folder is entered once for each part of the pattern that it is reached at: loops of links end.
    """

    def __init__(self, finder: _Finder, folder: InputFolder, pattern: Pattern) -> None:
        self._finder = finder
        self._folder = folder
        self._pattern = pattern
        self._folders = deque([("", pattern.start)])
        self._links: deque[tuple[str, States, str | None]] = deque()
        root = _identify(folder.absolute, _read_status(folder.absolute))
        self._entered: set[tuple[Identity, States]] = {(root, pattern.start)}

    def run(self) -> None:
        """Adds the files to those of the finder."""
        while self._folders or self._links:
            if self._folders:
                self._list(*self._folders.popleft())
            else:
                below, states, reason = self._links.popleft()
                self._visit(below, states, _read_status(self._path_of(below)), reason)

    def _path_of(self, below: str) -> str:
        return os.path.join(self._folder.absolute, below)

    def _name_of(self, below: str) -> str:
        given = self._folder.given
        return os.path.join(given, below) if below else given or os.curdir

    def _list(self, below: str, states: States) -> None:
        try:
            names = sorted(os.listdir(self._path_of(below)))
        except OSError as error:
            self._finder.listing.unreadable[self._name_of(below)] = describe(error)
            return
        for name in names:
            after = self._pattern.step(states, name)
            if not after:
                continue
            path = f"{below}/{name}" if below else name
            reason = self._pattern.refuse_name(states, name)
            status = _read_status(self._path_of(path), os.lstat)
            if status is not None and stat.S_ISLNK(status.st_mode):
                if not self._finder.is_allowed(self._path_of(path)):
                    reason = reason or "a link to a place that is not allowed"
                    self._finder.listing.leave_out(self._name_of(path), reason)
                    continue
                self._links.append((path, after, reason))
            else:
                self._visit(path, after, status, reason)

    def _visit(
        self, below: str, states: States, status: os.stat_result | None, reason: str | None
    ) -> None:
        """Takes a file or enters a folder, unless there is a reason to leave it out."""
        is_folder = status is not None and stat.S_ISDIR(status.st_mode)
        if is_folder and is_named_zarr(self._path_of(below)):
            if not self._pattern.accepts(states):
                return
            reason = reason or self._finder.take(LocalFile(self._folder, below), status)
        elif status is not None and is_folder:
            reason = reason or self._enter(below, states, status)
        elif self._pattern.accepts(states):
            reason = reason or self._take(below, status)
        else:
            return
        if reason is not None:
            self._finder.listing.leave_out(self._name_of(below), reason)

    def _enter(self, below: str, states: States, status: os.stat_result) -> str | None:
        if not self._pattern.descends(states):
            return "a folder"
        path = self._path_of(below)
        entered = (_identify(path, status), states)
        if entered in self._entered:
            return "a link to a folder that is listed already"
        self._entered.add(entered)
        reason = self._finder.refuse_folder(path, status)
        if reason is None:
            self._folders.append((below, states))
        return reason

    def _take(self, below: str, status: os.stat_result | None) -> str | None:
        if status is not None and not stat.S_ISREG(status.st_mode):
            return "not a regular file"
        reason = self._pattern.refuse_file(below)
        return reason or self._finder.take(LocalFile(self._folder, below), status)


def find_files(
    inputs: Sequence[str],
    listed: Iterable[str] = (),
    own: Mapping[Path, str] | None = None,
    is_allowed: Callable[[str], bool] | None = None,
) -> Listing:
    """Files, images in folders (recursively), matches of globs and URIs; each file once.

    Args:
        inputs: Paths, globs and URIs.
        listed: Paths of files and folders, and URIs, from a list.
        own: Paths that the run writes, and what they are; they are left out.
        is_allowed: Whether a local path may be used, after its links are followed. Links to
            others are left out; the inputs themselves must have been checked. None: all may.

    Raises:
        StartupError: An input gives no file, or pictures would be written among the images.
        OSError: An object store cannot be read.
    """
    finder = _Finder(own or {}, is_allowed)
    for given in inputs:
        finder.add(given)
    finder.add_listed(listed)
    if not finder.listing.files:
        raise finder.refuse("there are no images")
    return finder.listing


def read_list(source: str) -> list[str]:
    """The entries of a file that lists files: in lines, or separated by zero bytes.

    Args:
        source: The file; "-": standard input.

    Raises:
        OSError: It cannot be read.
    """
    data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    data = data.removeprefix(b"\xef\xbb\xbf")
    entries = data.split(b"\0") if b"\0" in data else data.splitlines()
    return [os.fsdecode(entry) for entry in entries if entry]
