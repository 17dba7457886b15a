"""Files that appear, or replace older ones, only when they are complete; locks of processes."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

PARTIAL = ".partial"
"""End of the name of an unfinished file."""
STALE_S = 24 * 3600.0
"""Age from which an unfinished file that others may write is taken for that of a killed process."""


@contextmanager
def replacing(path: Path, *, shared: bool = False, durable: bool = True) -> Iterator[Path]:
    """Yields a path to write to, in the same folder; the file there becomes `path` at the end.

    The folder is created; nothing is at the yielded path. The content keeps the mode of the file
    before. A link at `path` is replaced, not followed. After an error nothing has changed.

    Args:
        path: The file.
        shared: Others may write the same file at once; the last one counts.
        durable: The content is on the disk before it gets the name.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if shared:
        _sweep(path.parent)
    token = f".{secrets.token_hex(4)}" if shared else ""
    partial = path.with_name(f".{path.name}{token}{PARTIAL}")
    partial.unlink(missing_ok=True)  # of a process that was killed
    try:
        yield partial
        if durable:
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, partial)
        os.replace(partial, path)
    finally:
        with suppress(OSError):  # it is there after an error, or if it is a link to the same file
            partial.unlink()
    if durable:
        sync_folder(path.parent)


def replace_bytes(path: Path, data: bytes, *, shared: bool = False, durable: bool = True) -> None:
    """Writes a file as `replacing` does."""
    with replacing(path, shared=shared, durable=durable) as partial:
        partial.write_bytes(data)


def replace_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8 as `replacing` does."""
    replace_bytes(path, text.encode())


def _sweep(folder: Path) -> None:
    """Removes what processes that were killed have left."""
    for partial in folder.glob(f".*{PARTIAL}"):
        with suppress(OSError):
            if time.time() - partial.stat().st_mtime > STALE_S:
                partial.unlink()


def sync_folder(path: Path) -> None:
    """Waits until the entries of a folder are on the disk."""
    if sys.platform == "win32":  # folders cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Excludes other processes that lock the same file or folder, which exists; waits for them.

    Windows, and some network file systems, have no such locks: nothing is excluded there.
    """
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
