"""The results of a run of solo-predict, stored as they are found: it can be continued."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from service.jobs.database import Database, JournalDiffers, delete_files

_RUN = ""
"""Name of the only run in the file."""


class Journal:
    """An open journal, which one process uses; several threads may.

    An entry is in the file when `append` returns; `Database` says what it survives.

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
            delete_files(path)  # another format: there are no entries to clear
            self._open(options, restart=restart)

    def _open(self, options: Mapping[str, Any], *, restart: bool) -> None:
        self._database = Database(self.path)
        try:
            with self._database.transaction():
                self._prepare(dict(options), restart=restart)
        except BaseException:
            self.close()
            raise

    def _prepare(self, options: dict[str, Any], *, restart: bool) -> None:
        if restart:
            self._database.execute("DELETE FROM entries")
        self.served = self._database.value("SELECT served FROM entries LIMIT 1")
        if self.served is None:
            row = (_RUN, orjson.dumps(options))
            self._database.execute("INSERT OR REPLACE INTO runs VALUES (?, ?)", *row)
        else:
            before = self._database.value("SELECT options FROM runs WHERE run = ?", _RUN)
            self._check(orjson.loads(before), options)

    def _check(self, before: dict[str, Any], options: dict[str, Any]) -> None:
        changed = [
            f"{name} {before.get(name)!r}, now {options.get(name)!r}"
            for name in sorted({*before, *options})
            if before.get(name) != options.get(name)
        ]
        if changed:
            raise JournalDiffers(f"{self.path} is of a run with {'; '.join(changed)}")

    def _read(self, column: str, key: str) -> Any:
        query = f"SELECT {column} FROM entries WHERE run = ? AND key = ?"
        found = self._database.value(query, _RUN, key)
        return None if found is None else orjson.loads(found)

    def find(self, key: str) -> dict[str, Any] | None:
        """The `properties` of an entry; None if there is none."""
        properties: dict[str, Any] | None = self._read("properties", key)
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
        with self._lock:
            if self.served not in (None, served):
                raise JournalDiffers(
                    f"{self.path}: {key} was found by {served}, but the run began with "
                    f"{self.served}"
                )
            self._database.put_entry(_RUN, key, served, properties, results)
            self.served = served

    def read_results(self, key: str) -> list[dict[str, Any]]:
        """The results of an entry.

        Raises:
            KeyError: There is no such entry.
        """
        results: list[dict[str, Any]] | None = self._read("results", key)
        if results is None:
            raise KeyError(key)
        return results

    def remove(self) -> None:
        """Closes the journal and deletes its files."""
        self.close()
        self._database.delete_files()

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
