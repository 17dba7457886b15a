"""What the parent and a worker say to each other, over a pair of sockets.

parent -> worker: one byte: a listener's number, with a connection; or a signal's, to pass on
worker -> parent: how many connections it has; the first time it is ready
"""

from __future__ import annotations

import signal
import socket
import struct
from collections.abc import Iterator

MAIN, ADMIN = 0, 1
"""Numbers of the listeners; no signal that is passed on has these."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_REPORT = struct.Struct("!QI")
_MOST_AT_ONCE = 64


class ChannelClosed(Exception):
    """The other side has ended."""


class ParentEnd:
    """A worker's channel as the parent has it.

    Args:
        channel: Does not block.
    """

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self._rest = b""
        self._passed = 0
        self._received = 0
        self._open = 0

    @property
    def connections(self) -> int:
        """That the worker has, and that are on their way to it."""
        return self._open + self._passed - self._received

    def pass_connection(self, listener: int, connection: socket.socket) -> bool:
        """Hands a connection over; whether the worker had room for it."""
        try:
            socket.send_fds(self.channel, [bytes([listener])], [connection.fileno()])
        except OSError:  # too many are on the way, or the worker has ended
            return False
        self._passed += 1
        return True

    def pass_signal(self, number: int) -> None:
        """Hands a signal over."""
        try:
            self.channel.send(bytes([number]))
        except OSError:
            return  # it has ended

    def read_reports(self) -> bool:
        """Reads what the worker has said of its connections; whether it was anything.

        Raises:
            ChannelClosed: The worker has ended.
        """
        try:
            data = self.channel.recv(4096)
        except BlockingIOError:
            return False
        except OSError as error:
            raise ChannelClosed from error
        if not data:
            raise ChannelClosed
        data = self._rest + data
        whole = len(data) - len(data) % _REPORT.size
        self._rest = data[whole:]
        if not whole:
            return False
        self._received, self._open = _REPORT.unpack_from(data, whole - _REPORT.size)
        return True


class WorkerEnd:
    """The channel as the worker has it.

    Args:
        channel: Does not block.
    """

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self._received = 0

    def report(self, open_connections: int) -> None:
        """Tells the parent how many there are."""
        try:
            self.channel.send(_REPORT.pack(self._received, open_connections))
        except OSError:
            return  # full: the next report says it too; or the parent has ended

    def receive(self) -> Iterator[tuple[int, socket.socket | None]]:
        """What has come: a listener's number and a connection, or a signal's number and None.

        Raises:
            ChannelClosed: The parent has ended.
        """
        for _ in range(_MOST_AT_ONCE):
            try:
                data, descriptors, _, _ = socket.recv_fds(self.channel, 1, 1)
            except BlockingIOError:
                return
            except OSError as error:
                raise ChannelClosed from error
            if not data:
                raise ChannelClosed
            self._received += len(descriptors)
            connection = socket.socket(fileno=descriptors[0]) if descriptors else None
            yield data[0], connection
