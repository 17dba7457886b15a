"""Looks into journals of solo-predict that another process may be writing."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
from pathlib import Path


def read_keys(journal: Path) -> list[str]:
    """The keys of a journal's entries, from a copy: the journal itself is locked and unchanged."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "journal"
        for suffix in ("", "-wal"):  # in this order: what the log adds fits the file
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(f"{journal}{suffix}", f"{copy}{suffix}")
        with contextlib.closing(sqlite3.connect(copy)) as database:
            try:
                return [key for (key,) in database.execute("SELECT key FROM entries")]
            except sqlite3.Error:  # it has no tables yet
                return []
