"""The SQLite file of a journal: its format, its errors, and the entries that both kinds have.

One format for both: solo-predict stores the entries of one run, the server those of its jobs, with
the files that are still to be processed.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import orjson

from service.jobs.errors import RunFailed

_APPLICATION_ID = 0x534F4C4F
_FORMAT = 2
_SCHEMA = (
    """CREATE TABLE entries (
        run TEXT NOT NULL, key TEXT NOT NULL, served TEXT NOT NULL, properties BLOB NOT NULL,
        results BLOB NOT NULL, PRIMARY KEY (run, key)
    )""",
    "CREATE TABLE runs (run TEXT PRIMARY KEY, options BLOB NOT NULL)",
    """CREATE TABLE jobs (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL,
        idempotency TEXT, fingerprint TEXT NOT NULL, options BLOB NOT NULL, created_s REAL NOT NULL,
        finished_s REAL, files INTEGER NOT NULL, done INTEGER NOT NULL DEFAULT 0,
        failed INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL, served BLOB NOT NULL,
        turn INTEGER NOT NULL DEFAULT 0, webhook_state TEXT NOT NULL DEFAULT '',
        webhook_attempts INTEGER NOT NULL DEFAULT 0, webhook_error TEXT NOT NULL DEFAULT '',
        UNIQUE (owner, idempotency)
    )""",
    "CREATE INDEX jobs_open ON jobs (turn, seq) WHERE finished_s IS NULL",
    """CREATE TABLE pending (
        job INTEGER NOT NULL, number INTEGER NOT NULL, name TEXT NOT NULL, source TEXT,
        worker TEXT, beat INTEGER NOT NULL DEFAULT 0, attempts INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (job, number)
    ) WITHOUT ROWID""",
    "CREATE INDEX pending_open ON pending (job, attempts, number) WHERE worker IS NULL",
    "CREATE INDEX pending_taken ON pending (worker, job) WHERE worker IS NOT NULL",
    """CREATE TABLE uploads (
        job INTEGER NOT NULL, number INTEGER NOT NULL, data BLOB NOT NULL,
        PRIMARY KEY (job, number)
    )""",
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {_FORMAT}",
)
_WAIT_S = 10.0
"""How long an access waits for that of another process."""
_LOG_BYTES = 64 * 1024 * 1024
"""Size to which the write-ahead log is cut after it was larger."""


class JournalError(RunFailed):
    """A journal cannot be read or written; the text names the file and the reason."""


class JournalInUse(JournalError):
    """Another run has the journal open."""


class JournalDiffers(JournalError):
    """The journal's content does not fit the run: other options, model or file format."""


class JournalFull(JournalError):
    """There is no space left for the journal."""


@contextmanager
def translate_errors(path: Path) -> Iterator[None]:
    """Raises SQLite's errors as `JournalError`."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the extended part
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise JournalInUse(f"{path}: another run is writing it") from error
        if code == sqlite3.SQLITE_NOTADB:
            raise JournalDiffers(f"{path} is not a journal of this version") from error
        if code == sqlite3.SQLITE_CORRUPT:
            raise JournalDiffers(f"{path} is damaged ({error})") from error
        full = code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
        kind = JournalFull if full else JournalError
        raise kind(f"cannot use the journal {path}: {error}") from error


class Database:
    """An open file; several threads may use it.

    A transaction is in the file when it has ended, and survives the end of the process at any
    moment (SIGKILL). SQLite writes to a write-ahead log (PATH-wal).

    Args:
        path: The file; it is created, or read and continued.
        shared: Several processes may have it open, and every transaction is synced to the disk.
            Otherwise one process has it, and the log is synced only when it is copied into the
            file (synchronous=NORMAL): a power failure may cost the last transactions, but does
            not damage the others.

    Raises:
        JournalInUse: Another process has it open.
        JournalDiffers: It is no journal of this version.
        JournalError: It cannot be read or written.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self.path = path
        self._lock = threading.RLock()
        with translate_errors(path):
            self._connection = sqlite3.connect(
                path,
                timeout=_WAIT_S if shared else 0,
                isolation_level=None,
                check_same_thread=False,
            )
            try:
                self._open(shared=shared)
            except BaseException:
                self._connection.close()
                raise

    def _open(self, *, shared: bool) -> None:
        execute = self._connection.execute
        if not shared:
            # The lock is held from the first access until the connection is closed.
            execute("PRAGMA locking_mode = EXCLUSIVE")
        self._check_format()
        if shared:
            execute("PRAGMA auto_vacuum = INCREMENTAL")
            execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}")
        self._set_log_mode(_WAIT_S if shared else 0)
        execute(f"PRAGMA synchronous = {'FULL' if shared else 'NORMAL'}")
        with self.transaction():
            if self._is_empty():
                for statement in _SCHEMA:
                    execute(statement)
        # Another version may have made the tables since the check.
        self._check_format()

    def _set_log_mode(self, wait_s: float) -> None:
        """SQLite does not wait for other processes here."""
        deadline_s = time.monotonic() + wait_s
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError:
                if time.monotonic() >= deadline_s:
                    raise
            time.sleep(0.01)

    def _check_format(self) -> None:
        """Refuses any other file before it is changed."""
        if self._is_empty():
            return
        found = self.value("PRAGMA application_id"), self.value("PRAGMA user_version")
        if found != (_APPLICATION_ID, _FORMAT):
            raise JournalDiffers(f"{self.path} is not a journal of this version")

    def _is_empty(self) -> bool:
        return bool(self.value("SELECT count(*) FROM sqlite_master") == 0)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is done inside is stored together at the end; after an exception nothing is.

        Raises:
            JournalError: It cannot be stored. The file is as before and can be used.
        """
        with self._lock, translate_errors(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def execute(self, statement: str, *parameters: object) -> int:
        """Runs a statement; returns how many rows it has changed."""
        with self._lock, translate_errors(self.path):
            return self._connection.execute(statement, parameters).rowcount

    def execute_many(self, statement: str, rows: Iterator[Sequence[object]]) -> None:
        """Runs a statement with each of the rows."""
        with self._lock, translate_errors(self.path):
            self._connection.executemany(statement, rows)

    def rows(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        with self._lock, translate_errors(self.path):
            return self._connection.execute(query, parameters).fetchall()

    def value(self, query: str, *parameters: object) -> Any:
        """First column of the first row; None without rows."""
        with self._lock, translate_errors(self.path):
            row = self._connection.execute(query, parameters).fetchone()
        return None if row is None else row[0]

    def put_entry(
        self,
        run: str,
        key: str,
        served: str,
        properties: Mapping[str, Any],
        results: Sequence[Mapping[str, Any]],
    ) -> int:
        """Stores an entry; it replaces an earlier one with the same key.

        Returns:
            Its size in bytes.

        Raises:
            TypeError: The results are not JSON.
        """
        row = (run, key, served, orjson.dumps(properties), orjson.dumps(results))
        self.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?)", *row)
        return sum(map(len, row))

    def iterate_entries(self, run: str) -> Iterator[tuple[str, bytes, bytes]]:
        """Key, properties and results of a run's entries, by key, as they are now.

        They are read from a snapshot: it does not matter what is written or deleted meanwhile.
        """
        with (
            translate_errors(self.path),
            closing(
                sqlite3.connect(
                    f"{self.path.absolute().as_uri()}?mode=ro",
                    uri=True,
                    timeout=_WAIT_S,
                    check_same_thread=False,
                )
            ) as reader,
        ):
            query = "SELECT key, properties, results FROM entries WHERE run = ? ORDER BY key"
            yield from reader.execute(query, (run,))

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    def delete_files(self) -> None:
        """Deletes the file and its log; it must be closed."""
        delete_files(self.path)


def delete_files(path: Path) -> None:
    """Deletes a database that nobody has open."""
    for suffix in ("", "-wal"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
