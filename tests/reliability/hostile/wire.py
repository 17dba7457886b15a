"""One raw connection, in the words in which a client misbehaves.

    with Wire(port) as wire:
        wire.send(b"GET /healthz HTTP/1.1\\r\\n")     # at once
        wire.send_slowly(b"Host: x", pause_s=0.1)    # byte by byte, until it answers
        wire.pause(1)
        wire.half_close()                            # ends the sending side
        wire.expect_status(408, within_s=5)          # the next response; returns its body
        wire.expect_close(within_s=5)                # nothing more comes, the server closes
        wire.reset()                                 # RST instead of FIN

A server that closes while data are sent is no error: `sent_all` says so, and what it has answered
can still be read.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from types import TracebackType

SENDING_S = 20.0
"""Longest time for `send`."""


class Wire:
    """A connection to a port of this machine.

    Args:
        port: The server's.
        receive_buffer: Bytes that the system takes while nobody reads.

    Attributes:
        sent_all: Whether the server has taken everything.
    """

    def __init__(self, port: int, receive_buffer: int | None = None) -> None:
        self._socket = socket.socket()
        if receive_buffer is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._socket.settimeout(SENDING_S)
        self._socket.connect(("127.0.0.1", port))
        self._received = bytearray()
        self.sent_all = True

    def __enter__(self) -> Wire:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._socket.close()

    def send(self, data: bytes) -> Wire:
        """Sends all at once."""
        self._socket.settimeout(SENDING_S)
        try:
            self._socket.sendall(data)
        except ConnectionError:
            self.sent_all = False
        return self

    def send_slowly(
        self, data: bytes, pause_s: float, piece: int = 1, *, attentive: bool = True
    ) -> Wire:
        """Sends pieces with pauses, until the server closes; an attentive client also stops when it
        is answered."""
        for start in range(0, len(data), piece):
            if not self.sent_all or (attentive and self.is_answered()):
                break
            self.send(data[start : start + piece])
            time.sleep(pause_s)
        return self

    def pause(self, seconds: float) -> Wire:
        """Does nothing."""
        time.sleep(seconds)
        return self

    def half_close(self) -> Wire:
        """Ends the sending side."""
        self._socket.shutdown(socket.SHUT_WR)
        return self

    def reset(self) -> None:
        """Closes with a reset."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def expect_status(self, *statuses: int, within_s: float = 10.0) -> bytes:
        """Reads the next response, which must have one of the statuses.

        Returns:
            Its body.
        """
        deadline_s = time.monotonic() + within_s
        while b"\r\n\r\n" not in self._received:
            assert self._receive(deadline_s), f"closed after {bytes(self._received)!r}"
        head, _, rest = bytes(self._received).partition(b"\r\n\r\n")
        status = int(head.split(b" ")[1])
        assert status in statuses, f"{status}: {bytes(self._received)!r}"
        length = _find_length(head)
        while length is not None and len(rest) < length:
            assert self._receive(deadline_s), f"the response is cut: {bytes(self._received)!r}"
            rest = bytes(self._received).partition(b"\r\n\r\n")[2]
        end = len(rest) if length is None else length
        self._received = bytearray(rest[end:])
        return rest[:end]

    def is_answered(self) -> bool:
        """Whether there is something to read, or the server has closed."""
        return bool(self._received) or self._can_read(0)

    def expect_close(self, within_s: float = 10.0) -> None:
        """Waits for the server to close; no other response may come before."""
        while self._receive(time.monotonic() + within_s):
            pass
        assert not self._received, bytes(self._received[:200])

    def read_until_closed(self, within_s: float = 10.0) -> bytes:
        """What comes until the server closes."""
        while self._receive(time.monotonic() + within_s):
            pass
        return bytes(self._received)

    def _can_read(self, timeout_s: float) -> bool:
        return bool(select.select([self._socket], [], [], max(0.0, timeout_s))[0])

    def _receive(self, deadline_s: float) -> bool:
        """Takes more bytes; False if there are none any more."""
        if not self._can_read(deadline_s - time.monotonic()):
            raise AssertionError(f"nothing came in time after {bytes(self._received[:200])!r}")
        try:
            data = self._socket.recv(65_536)
        except ConnectionError:
            return False
        self._received += data
        return bool(data)


def _find_length(head: bytes) -> int | None:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.split(b":")[1])
    return None
