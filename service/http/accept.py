"""Accepts connections, also while there are no file descriptors left, and serves them."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterator

import uvicorn

logger = logging.getLogger(__name__)

PAUSE_S = 1.0
"""How long nothing is accepted after an error: the kernel would report it again at once."""
_MOST_AT_ONCE = 64


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
            OSError: No connection can be accepted; `refuse` those that wait, and try again after
                `PAUSE_S`.
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
            yield connection

    def close(self) -> None:
        """Closes the spare descriptor; the listening socket is the caller's."""
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None

    def refuse(self) -> None:
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


async def serve_connection(
    server: uvicorn.Server,
    connection: socket.socket,
    when_lost: Callable[[], None] | None = None,
) -> None:
    """As uvicorn does with a connection that it has accepted itself.

    Args:
        server: Has started.
        connection: Not read from yet.
        when_lost: Called after the server has forgotten the connection.
    """

    def build() -> asyncio.Protocol:
        protocol: asyncio.Protocol = server.config.http_protocol_class(  # type: ignore[call-arg]
            config=server.config,
            server_state=server.server_state,
            app_state=server.lifespan.state,
        )
        if when_lost is not None:
            _call_when_lost(protocol, when_lost)
        return protocol

    connection.setblocking(False)
    try:
        await asyncio.get_running_loop().connect_accepted_socket(build, connection)
    except OSError as error:  # the client is gone already
        connection.close()
        logger.debug("a connection was lost on its way: %s", error)


def _call_when_lost(protocol: asyncio.Protocol, act: Callable[[], None]) -> None:
    lost = protocol.connection_lost

    def connection_lost(error: Exception | None) -> None:
        lost(error)
        act()

    protocol.connection_lost = connection_lost  # type: ignore[method-assign, assignment]
