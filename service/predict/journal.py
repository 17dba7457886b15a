"""The results of a run as they come, so that a run that was cut goes on where it stopped.

A file of JSON lines: the run's options first, then an entry for each image that is done.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from service.errors import StartupError
from service.predict.errors import RunFailed
from service.predict.files import ImageFile, key_of

FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """Where an image's results are, and what they are of.

    Attributes:
        stamp: Size and modification time of the image's file, see `files.stamp_of`.
        overlay: Name of the picture that was drawn, or None.
        start, size: Its line in the journal, bytes.
    """

    stamp: list[int]
    overlay: str | None
    start: int
    size: int


def _read_line(line: bytes) -> dict[str, Any] | None:
    try:
        content = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    is_whole = line.endswith(b"\n") and isinstance(content, dict)
    return content if is_whole and content.get("format") == FORMAT else None


class Journal:
    """An open journal; `append` may be called by several threads.

    Args:
        path: The file; it is made, or read and gone on with.
        options: What the results depend on.
        restart: Forget what is there.

    Raises:
        StartupError: It belongs to other options or another run is writing it.
    """

    def __init__(self, path: Path, options: Mapping[str, Any], *, restart: bool = False) -> None:
        self.path = path
        self.served: str | None = None
        self._entries: dict[str, Entry] = {}
        self._lock = threading.Lock()
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by close()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if restart:
                self._file.truncate(0)
            self._load(dict(options))
        except BlockingIOError as error:
            self._file.close()
            raise StartupError(f"{path}: another run is writing it") from error
        except BaseException:
            self._file.close()
            raise

    def _load(self, options: dict[str, Any]) -> None:
        """Reads what is there; what follows a line that was cut short is done again."""
        self._file.seek(0)
        end = 0
        header: dict[str, Any] = {}
        for line in self._file:
            content = _read_line(line)
            if content is None:
                break
            if end == 0:
                header = content
            else:
                self._note(content, end, len(line))
            end += len(line)
        if self._entries:
            self._check(header, options)
            self._file.truncate(end)
        else:
            self._file.truncate(0)
            self._write({"format": FORMAT, "options": options})

    def _check(self, header: dict[str, Any], options: dict[str, Any]) -> None:
        before: dict[str, Any] = header["options"]
        changed = [
            f"{name} {before.get(name)!r}, now {options.get(name)!r}"
            for name in sorted({*before, *options})
            if before.get(name) != options.get(name)
        ]
        if changed:
            raise StartupError(
                f"{self.path} is of a run with {'; '.join(changed)}. Give the same options to go "
                "on, another --out, or --restart to begin anew"
            )

    def _note(self, content: dict[str, Any], start: int, size: int) -> None:
        self.served = self.served or content["served"]
        entry = Entry(content["stamp"], content["overlay"], start, size)
        self._entries[content["file"]] = entry

    def _write(self, content: dict[str, Any]) -> tuple[int, int]:
        line = orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE)
        start = os.fstat(self._file.fileno()).st_size
        written = self._file.write(line)
        if written != len(line):  # a full disk; the piece must not stay before the next line
            self._file.truncate(start)
            raise OSError(f"{self.path}: {written} of {len(line)} bytes were written")
        return start, len(line)

    def find(self, file: ImageFile) -> Entry | None:
        """An image's entry, or None if it has none."""
        return self._entries.get(key_of(file))

    def append(
        self,
        file: ImageFile,
        stamp: list[int],
        served: str,
        results: list[dict[str, Any]],
        overlay: str | None,
    ) -> None:
        """Notes that an image is done; it is in the file when this returns.

        Raises:
            RunFailed: It was found by another model or version than the others.
            OSError: It cannot be written.
        """
        content = {
            "format": FORMAT,
            "file": key_of(file),
            "stamp": stamp,
            "served": served,
            "overlay": overlay,
            "results": results,
        }
        with self._lock:
            if self.served not in (None, served):
                raise RunFailed(
                    f"{file}: found by {served}, but the run began with {self.served}; name a "
                    "--version, or begin anew with --restart"
                )
            start, size = self._write(content)
            self._note(content, start, size)

    def read_results(self, file: ImageFile) -> list[dict[str, Any]]:
        """COCO results of an image that is done, without their image_id."""
        entry = self._entries[key_of(file)]
        line = os.pread(self._file.fileno(), entry.size, entry.start)
        results: list[dict[str, Any]] = orjson.loads(line)["results"]
        return results

    def remove(self) -> None:
        """Deletes the file: it is not needed any more."""
        self.path.unlink()

    def close(self) -> None:
        """Closes the file and lets other runs have it."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
