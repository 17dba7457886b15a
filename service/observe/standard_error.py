"""Standard error, which may be closed, or a pipe that nobody reads."""

from __future__ import annotations

import logging
import os
import select
import sys

_CHUNK_BYTES: int = getattr(select, "PIPE_BUF", 512)
"""A pipe or terminal that is ready for writing takes as many at once."""


def open_standard_files() -> None:
    """Opens the null device for each of descriptors 0 to 2 that is closed.

    Otherwise a client's connection could get such a descriptor, and with it what libraries print.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # takes the lowest free one
            if opened != descriptor:
                os.close(opened)
                continue
            os.set_inheritable(descriptor, True)
        if getattr(sys, name) is None:
            mode = "r" if descriptor == 0 else "w"
            setattr(sys, name, os.fdopen(descriptor, mode, closefd=False))


class StandardErrorHandler(logging.Handler):
    """Writes lines to standard error without waiting for its reader.

    Lines that do not fit are dropped, and counted in the next one that does.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lost = 0
        self._is_cut = False

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record."""
        try:
            text = self.format(record) + "\n"
        except Exception:  # as logging's own handlers do
            self.handleError(record)
            return
        if self._lost:
            text = f"{self._lost} log lines were lost, standard error was not read\n{text}"
        try:
            is_written = self._write(text)
        except (OSError, ValueError):  # nobody will read it any more
            is_written = False
        self._lost = 0 if is_written else self._lost + 1

    def _write(self, text: str) -> bool:
        """Whether there was room for all of it."""
        try:
            descriptor = sys.stderr.fileno()
        except (AttributeError, OSError, ValueError):  # replaced by an object, or None
            if sys.stderr is not None:
                sys.stderr.write(text)
            return True
        if self._is_cut:
            text = f"\n{text}"
        rest = memoryview(text.encode(errors="backslashreplace"))
        size = len(rest)
        while rest:
            if not _is_writable(descriptor):
                self._is_cut = self._is_cut or len(rest) < size
                return False
            rest = rest[os.write(descriptor, rest[:_CHUNK_BYTES]) :]
            self._is_cut = False
        return True


def _is_writable(descriptor: int) -> bool:
    if sys.platform == "win32":  # select takes only sockets there
        return True
    return bool(select.select([], [descriptor], [], 0)[1])
