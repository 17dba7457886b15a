"""The output folder of a run belongs to one run at a time."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import shlex
import socket
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from training import distributed

if sys.platform != "win32":
    import fcntl

BEST_FILE = "best.pt"
LOCK_FILE = ".lock"


class FolderInUse(OSError):
    """Another process trains into the folder; the message names it."""


def require_writable(folder: Path) -> None:
    """Creates a file in a folder, or in that where it would be created, and removes the file.

    Raises:
        OSError: That is not possible; the message names the folder.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(f"{folder} cannot be written: {existing}: {error.strerror}") from error


def export_command(options: argparse.Namespace, folder: Path) -> str:
    """The command that publishes the best checkpoint of a run of solo-train with `options`."""
    data = ["--data", str(options.data)]
    for name, value, default in (
        ("--format", options.format, None),
        ("--val-fraction", options.val_fraction, None),
        ("--split", options.val_split, "val"),
    ):
        data += [name, str(value)] if value != default else []
    return shlex.join(["solo-export", str(folder / BEST_FILE), "--out", "model_repo", *data])


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Excludes other runs from a folder, which is created; in several processes, the first locks.

    The lock is that of the operating system on `LOCK_FILE`: it ends with the process, however that
    ends, and is not inherited by data loading processes. File systems without locks are not locked.

    Raises:
        FolderInUse: Another run holds the folder; raised in every process.
        OSError: The folder cannot be created or written.
    """
    descriptor, problem = None, None
    if distributed.is_main():
        try:
            descriptor = _lock(folder)
        except OSError as error:
            problem = error
    try:
        problem = distributed.from_main(problem)
        if problem is not None:
            raise problem
        yield
    finally:
        if descriptor is not None:
            _release(folder, descriptor)


def _lock(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if sys.platform != "win32":
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
            os.close(descriptor)  # the run before has just removed it
            return _lock(folder)
        os.ftruncate(descriptor, 0)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        owner = f"process {os.getpid()} on {socket.gethostname()} since {started}"
        os.write(descriptor, owner.encode())
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            owner = os.read(descriptor, 1000).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise FolderInUse(
                f"{folder} is in use by {owner}; wait for its end, stop it, or choose another --out"
            ) from None
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            os.close(descriptor)
            raise
    return descriptor


def _release(folder: Path, descriptor: int) -> None:
    """Ends the lock; removes a folder in which a run that failed at once has written nothing."""
    with contextlib.suppress(OSError):
        if [path.name for path in folder.iterdir()] == [LOCK_FILE]:
            (folder / LOCK_FILE).unlink()
            folder.rmdir()
        else:
            os.ftruncate(descriptor, 0)
    os.close(descriptor)
