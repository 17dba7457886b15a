"""Messages between the parent and a worker, over a pair of stream sockets.

Every message has a fixed size in its direction. One that carries a descriptor says so by its kind,
so a descriptor that is lost (the receiver has no free one) does not change the message's meaning.
"""

from __future__ import annotations

import socket
import struct
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

MAIN, ADMIN = 0, 1
"""Numbers of the listeners."""
_MOST_AT_ONCE = 64
_FLAGS: int = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class Order(IntEnum):
    """Kinds of messages to a worker; all but SIGNAL carry a descriptor.

    CONNECTION: of the listener `number`.
    SIGNAL: `number` is the signal.
    COLLECT: the worker's metrics are to be written to it.
    METRICS: those of the worker `number` can be read from it, as asked for with `tag`; there is no
        descriptor if that worker is not available.
    """

    CONNECTION = 1
    SIGNAL = 2
    COLLECT = 3
    METRICS = 4


class State(IntEnum):
    """What a worker does with new connections.

    SERVES: its engines answer and new work is accepted.
    REFUSES: it answers, but new work is refused.
    CLOSED: it closes them.
    FAILED: as REFUSES, and it must be replaced.
    """

    SERVES = 1
    REFUSES = 2
    CLOSED = 3
    FAILED = 4


class _Answer(IntEnum):
    """Kinds of messages to the parent.

    REPORT: connections received so far, connections that are open, the state.
    ASK: the metrics of all other workers are wanted; has the tag of the answers.
    """

    REPORT = 1
    ASK = 2


_ORDER = struct.Struct("!BHI")  # kind, number, tag
_ANSWER = struct.Struct("!BQIB")  # kind, received or tag, open, state


@dataclass(frozen=True)
class Message:
    """A message to a worker.

    Attributes:
        kind: See `Order`.
        number: See `Order`.
        tag: See `Order`.
        connection: Made of the descriptor; None if there is none, or it could not be received.
    """

    kind: Order
    number: int
    tag: int
    connection: socket.socket | None


class ChannelClosed(Exception):
    """The other side has ended."""


class ParentEnd:
    """A worker's channel as the parent has it.

    Args:
        channel: Does not block.

    Attributes:
        heard_s: Time of the last report by the monotonic clock; of the start before the first one.
        state: As reported last.
    """

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.heard_s = time.monotonic()
        self.state = State.CLOSED
        self._rest = b""
        self._received = 0
        self._open = 0
        self._unreceived: deque[tuple[int, socket.socket]] = deque()

    @property
    def connections(self) -> int:
        """That the worker has, and that are on their way to it."""
        return self._open + len(self._unreceived)

    def send(
        self, kind: Order, number: int = 0, tag: int = 0, carried: socket.socket | None = None
    ) -> bool:
        """Sends a message; False if the channel is full or the worker has ended."""
        data = _ORDER.pack(kind, number, tag)
        try:
            if carried is None:
                self.channel.send(data)
            else:
                socket.send_fds(self.channel, [data], [carried.fileno()])
        except OSError:
            return False
        return True

    def pass_connection(self, listener: int, connection: socket.socket) -> bool:
        """Hands a connection over, which is closed here when the worker has it.

        Returns:
            Whether there was room; if not, the connection is still the caller's.
        """
        if not self.send(Order.CONNECTION, listener, carried=connection):
            return False
        self._unreceived.append((listener, connection))
        return True

    def take_back(self) -> list[tuple[int, socket.socket]]:
        """The connections that the worker has not received; it must have ended."""
        connections = list(self._unreceived)
        self._unreceived.clear()
        return connections

    def read(self) -> list[int] | None:
        """Reads what the worker has sent.

        Returns:
            Tags of the requests for metrics; None if nothing has come.

        Raises:
            ChannelClosed: The worker has ended, and nothing it sent is unread.
        """
        try:
            data = self.channel.recv(4096)
        except BlockingIOError:
            return None
        except OSError as error:
            raise ChannelClosed from error
        if not data:
            raise ChannelClosed
        data = self._rest + data
        whole = len(data) - len(data) % _ANSWER.size
        self._rest = data[whole:]
        tags = []
        for kind, value, connections, state in _ANSWER.iter_unpack(data[:whole]):
            if kind == _Answer.ASK:
                tags.append(value)
                continue
            self.heard_s = time.monotonic()
            self._open, self.state = connections, State(state)
            for _ in range(min(value - self._received, len(self._unreceived))):
                self._unreceived.popleft()[1].close()
            self._received = value
        return tags


class WorkerEnd:
    """The channel as the worker has it.

    Args:
        channel: Does not block.
    """

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self._received = 0
        self._rest = b""
        self._descriptors: list[int] = []

    def report(self, open_connections: int, state: State) -> None:
        """Tells the parent how many connections there are, and what becomes of new ones.

        The parent takes a connection that was not reported as received for one that is lost if the
        worker ends, so a report must come before anything is read from the connection.
        """
        self._send(_Answer.REPORT, self._received, open_connections, state)

    def ask(self, tag: int) -> None:
        """Asks for the metrics of all other workers."""
        self._send(_Answer.ASK, tag, 0, 0)

    def _send(self, *values: int) -> None:
        try:
            self.channel.send(_ANSWER.pack(*values))
        except OSError:
            return  # full: the next report says it too; or the parent has ended

    def receive(self) -> Iterator[Message]:
        """The messages that have come.

        Raises:
            ChannelClosed: The parent has ended.
        """
        for _ in range(_MOST_AT_ONCE):
            wanted = _ORDER.size - len(self._rest)
            try:
                data, descriptors, _, _ = socket.recv_fds(self.channel, wanted, 1, _FLAGS)
            except BlockingIOError:
                return
            except OSError as error:
                raise ChannelClosed from error
            if not data:
                raise ChannelClosed
            self._rest += data
            self._descriptors += descriptors
            if len(self._rest) == _ORDER.size:
                yield self._take()

    def _take(self) -> Message:
        kind, number, tag = _ORDER.unpack(self._rest)
        self._rest = b""
        connection = socket.socket(fileno=self._descriptors.pop()) if self._descriptors else None
        if kind == Order.CONNECTION:
            self._received += 1
        return Message(Order(kind), number, tag, connection)
