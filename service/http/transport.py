"""The transport that uvicorn's protocol gets from `service.http.guard`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

RESPONSE_START = b"HTTP/1.1 "
"""First bytes of every response."""


class GuardedTransport(asyncio.Transport):
    """Counts what is written, and leaves it to the guard how to close.

    Args:
        transport: The connection's own.
        close: Called by `close`.

    Attributes:
        wrapped: The connection's own transport.
        written: Bytes written so far.
    """

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        super().__init__()
        self.wrapped = transport
        self.written = 0
        self._close = close
        self._has_ended = False
        self._sent_ahead = 0

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        """Writes, unless the connection is closing; skips what `send_ahead` has sent."""
        if self.is_closing():
            return
        if self._sent_ahead:
            data = data[self._sent_ahead :]
            self._sent_ahead = 0
        self.written += len(data)
        self.wrapped.write(data)

    def send_ahead(self) -> bool:
        """Sends the next byte of a response that has not started; False if no more can be sent.

        A client that has closed the connection answers with a reset. One that has only ended its
        sending side gets the start of its response early.
        """
        if self._sent_ahead == len(RESPONSE_START) or self.is_closing():
            return False
        self.wrapped.write(RESPONSE_START[self._sent_ahead : self._sent_ahead + 1])
        self._sent_ahead += 1
        self.written += 1
        return True

    @property
    def taken(self) -> int:
        """Bytes that the system has taken from what was written."""
        return self.written - self.wrapped.get_write_buffer_size()

    def close(self) -> None:
        """Asks the guard to close the connection."""
        self._close()

    def abort(self) -> None:
        """Closes at once; what was not sent is lost."""
        self.wrapped.abort()

    def is_closing(self) -> bool:
        """Whether the connection is closed or being closed."""
        return self._has_ended or self.wrapped.is_closing()

    def write_eof(self) -> None:
        """Ends the sending side; what is written later is dropped."""
        self._has_ended = True
        self.wrapped.write_eof()

    def pause_reading(self) -> None:
        """As the connection's own transport."""
        self.wrapped.pause_reading()

    def resume_reading(self) -> None:
        """As the connection's own transport."""
        self.wrapped.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """As the connection's own transport."""
        return self.wrapped.get_extra_info(name, default)

    def get_write_buffer_size(self) -> int:
        """As the connection's own transport."""
        return self.wrapped.get_write_buffer_size()
