"""The results of a run, stored as they are found, so that an interrupted run can continue."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from service.predict.errors import RunFailed

_APPLICATION_ID = 0x534F4C4F
_FORMAT = 1
_SCHEMA = f"""
CREATE TABLE run (options BLOB NOT NULL);
CREATE TABLE entries (
    key TEXT PRIMARY KEY, served TEXT NOT NULL, properties BLOB NOT NULL, results BLOB NOT NULL
);
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_FORMAT};
"""


class JournalError(RunFailed):
    """A journal cannot be read or written; the text names the file and the reason."""


class JournalInUse(JournalError):
    """Another run has the journal open."""


class JournalDiffers(JournalError):
    """The journal's content does not fit the run: other options, model or file format."""


@contextmanager
def _translate_errors(path: Path) -> Iterator[None]:
    """Raises SQLite's errors as `JournalError`."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the extended part
        if code == sqlite3.SQLITE_BUSY:
            raise JournalInUse(f"{path}: another run is writing it") from error
        if code == sqlite3.SQLITE_NOTADB:
            raise JournalDiffers(f"{path} is not a journal of this version") from error
        if code == sqlite3.SQLITE_CORRUPT:
            raise JournalDiffers(f"{path} is damaged ({error})") from error
        raise JournalError(f"cannot use the journal {path}: {error}") from error


class Journal:
    """An open journal: an SQLite file that one process uses; several threads may.

    An entry is in the file when `append` returns, and survives the end of the process at any
    moment (SIGKILL). SQLite writes to a write-ahead log (PATH-wal) and syncs it to the disk only
    when it copies it into the file (synchronous=NORMAL): a power failure may cost the last
    entries, but does not damage the others.

    Args:
        path: The file; it is created, or read and continued.
        options: JSON object with everything the results depend on.
        restart: Discards what the file contains.

    Attributes:
        served: Model and version that produced all entries; None while there are none.

    Raises:
        JournalInUse: Another run has it open.
        JournalDiffers: It has entries of other options, or is no journal of this version.
        JournalError: It cannot be read or written.
    """

    def __init__(self, path: Path, options: Mapping[str, Any], *, restart: bool = False) -> None:
        self.path = path
        self.served: str | None = None
        self._lock = threading.Lock()
        try:
            self._open(options, restart=restart)
        except JournalDiffers:
            if not restart:
                raise
            self._delete_files()  # another format: there are no entries to clear
            self._open(options, restart=restart)

    def _open(self, options: Mapping[str, Any], *, restart: bool) -> None:
        with _translate_errors(self.path):
            self._database = sqlite3.connect(
                self.path, timeout=0, isolation_level=None, check_same_thread=False
            )
            try:
                # The lock is held from the first access until the connection is closed.
                self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
                self._check_format()
                self._database.execute("PRAGMA journal_mode = WAL")
                self._database.execute("PRAGMA synchronous = NORMAL")
                self._prepare(dict(options), restart=restart)
            except BaseException:
                self._database.close()
                raise

    def _check_format(self) -> None:
        """Refuses any other file before it is changed."""
        if self._is_empty():
            return
        found = self._value("PRAGMA application_id"), self._value("PRAGMA user_version")
        if found != (_APPLICATION_ID, _FORMAT):
            raise JournalDiffers(f"{self.path} is not a journal of this version")

    def _is_empty(self) -> bool:
        return bool(self._value("SELECT count(*) FROM sqlite_master") == 0)

    def _prepare(self, options: dict[str, Any], *, restart: bool) -> None:
        if self._is_empty():
            self._database.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT")
        if restart:
            self._database.execute("DELETE FROM entries")
        self.served = self._value("SELECT served FROM entries LIMIT 1")
        if self.served is None:
            self._database.execute("DELETE FROM run")
            self._database.execute("INSERT INTO run VALUES (?)", [orjson.dumps(options)])
        else:
            self._check(orjson.loads(self._value("SELECT options FROM run")), options)

    def _check(self, before: dict[str, Any], options: dict[str, Any]) -> None:
        changed = [
            f"{name} {before.get(name)!r}, now {options.get(name)!r}"
            for name in sorted({*before, *options})
            if before.get(name) != options.get(name)
        ]
        if changed:
            raise JournalDiffers(f"{self.path} is of a run with {'; '.join(changed)}")

    def _value(self, query: str, *parameters: str) -> Any:
        """First column of the first row; None without rows."""
        row = self._database.execute(query, parameters).fetchone()
        return None if row is None else row[0]

    def find(self, key: str) -> dict[str, Any] | None:
        """The `properties` of an entry; None if there is none."""
        with self._lock, _translate_errors(self.path):
            found = self._value("SELECT properties FROM entries WHERE key = ?", key)
        properties: dict[str, Any] | None = None if found is None else orjson.loads(found)
        return properties

    def append(
        self,
        key: str,
        results: list[dict[str, Any]],
        *,
        served: str,
        properties: Mapping[str, Any],
    ) -> None:
        """Stores an entry; it replaces an earlier one with the same key.

        Args:
            key: Names the image.
            results: What was found in it.
            served: Model and version that found it, "name:version".
            properties: JSON object for the caller, e.g. to recognise a changed image.

        Raises:
            JournalDiffers: The other entries are from another model or version.
            JournalError: It cannot be written. The journal is as before and can be used.
            TypeError: The results are not JSON.
        """
        row = [key, served, orjson.dumps(properties), orjson.dumps(results)]
        with self._lock, _translate_errors(self.path):
            if self.served not in (None, served):
                raise JournalDiffers(
                    f"{self.path}: {key} was found by {served}, but the run began with "
                    f"{self.served}"
                )
            self._database.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)", row)
            self.served = served

    def read_results(self, key: str) -> list[dict[str, Any]]:
        """The results of an entry.

        Raises:
            KeyError: There is no such entry.
        """
        with self._lock, _translate_errors(self.path):
            found = self._value("SELECT results FROM entries WHERE key = ?", key)
        if found is None:
            raise KeyError(key)
        results: list[dict[str, Any]] = orjson.loads(found)
        return results

    def remove(self) -> None:
        """Closes the journal and deletes its files."""
        self.close()
        self._delete_files()

    def _delete_files(self) -> None:
        self.path.unlink(missing_ok=True)
        self.path.with_name(self.path.name + "-wal").unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the file; another run can then open it."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
