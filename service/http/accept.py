"""Accepts connections, also while there are no file descriptors left."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

PAUSE_S = 1.0
"""How long nothing is accepted after an error: the kernel would report it again at once."""
_MOST_AT_ONCE = 64
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Accepter:
    """Accepts the connections of one listening socket.

    A spare descriptor is kept. When there is no other one, it is given up to close the connections
    that wait, so that clients are refused instead of left without an answer.

    Args:
        listener: Does not block.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._spare = _open_spare()

    def accept(self) -> Iterator[socket.socket]:
        """Yields the connections that wait, up to a limit.

        Raises:
            OSError: No connection can be accepted; try again after `PAUSE_S`.
        """
        if self._spare is None:
            self._spare = _open_spare()
        for _ in range(_MOST_AT_ONCE):
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except (ConnectionAbortedError, InterruptedError):
                continue
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._refuse()
                raise
            yield connection

    def close(self) -> None:
        """Closes the spare descriptor; the listening socket is the caller's."""
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None

    def _refuse(self) -> None:
        """Closes the connections that wait, up to a limit."""
        for _ in range(_MOST_AT_ONCE):
            if self._spare is None:
                return
            self.close()
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            else:
                connection.close()
            finally:
                self._spare = _open_spare()


def _open_spare() -> int | None:
    try:
        return os.open(os.devnull, os.O_RDONLY)
    except OSError:
        return None
