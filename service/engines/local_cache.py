"""A folder for what engines compute on this machine and would otherwise compute at every start."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl


def find_local_cache(wanted: Path | None = None) -> Path | None:
    """A folder that exists and can be written, or None.

    Args:
        wanted: What the settings say; None takes the user's cache folder. Never a folder that
            other users can write, such as /tmp: engines trust the files.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = wanted if wanted is not None else Path(home) / "solo-serve"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    return None


@contextmanager
def lock_file(file: Path | None) -> Iterator[None]:
    """Excludes other processes that want the same file, where the system can do that."""
    if file is None or sys.platform == "win32":
        yield
        return
    descriptor = None
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def replace_file(file: Path, data: bytes) -> None:
    """Writes and syncs a file atomically.

    Raises:
        OSError: It cannot be written; the previous file is unchanged.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as partial:
            partial.write(data)
            partial.flush()
            os.fsync(partial.fileno())
        os.replace(name, file)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
