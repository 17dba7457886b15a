"""A folder for what engines compute on this machine and would otherwise compute at every start."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from service.files import locked


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
    with ExitStack() as stack:
        if file is not None:
            with suppress(OSError):
                lock = file.with_suffix(".lock")
                lock.parent.mkdir(parents=True, exist_ok=True)
                lock.touch(mode=0o600)
                stack.enter_context(locked(lock))
        yield
