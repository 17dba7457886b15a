"""Listening sockets: bound before the models are loaded, accepted from while they are served."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from typing import TYPE_CHECKING

import uvicorn

from service.background import spawn
from service.errors import StartupError
from service.http.accept import PAUSE_S, Accepter, serve_connection
from service.observe.rare import RareWarning
from service.settings import Settings

if TYPE_CHECKING:
    from service.http.servers import AdminServer, DrainingServer

logger = logging.getLogger(__name__)

_BACKLOG = 2048
MAIN, ADMIN = "running", "admin endpoints"
"""What is logged of the two."""


class Listeners:
    """The ports of a server of one process; a `ConnectionSource`.

    Accepting is not left to the event loop: uvloop gives a listening socket up after some errors,
    and neither it nor asyncio say in one line that there are no file descriptors left.

    Args:
        settings: Hosts and ports.

    Raises:
        StartupError: A port is not available.
    """

    has_signals = False

    def __init__(self, settings: Settings) -> None:
        self._sockets = [bind(settings.host, settings.port, "requests")]
        if settings.admin_port is not None:
            try:
                self._sockets.append(bind(settings.admin_host, settings.admin_port, ADMIN))
            except StartupError:
                self._sockets[0].close()
                raise
        self._accepters: list[Accepter] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._warn = RareWarning(logger)

    async def start(self, main: DrainingServer, admin: AdminServer | None) -> None:
        """Listens; needs a running event loop."""
        servers: list[uvicorn.Server] = [main] if admin is None else [main, admin]
        for listener, server, what in zip(self._sockets, servers, (MAIN, ADMIN), strict=False):
            accepter = listen(listener, what)
            self._accepters.append(accepter)
            accepting = asyncio.ensure_future(self._accept(listener, accepter, server))
            self._accepting.append(accepting)

    def stop(self) -> None:
        """Closes the sockets."""
        for accepting in self._accepting:
            accepting.cancel()
        for accepter in self._accepters:
            accepter.close()
        for listener in self._sockets:
            listener.close()

    async def _accept(
        self, listener: socket.socket, accepter: Accepter, server: uvicorn.Server
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
                spawn(serve_connection(server, connection), self._tasks)
                for connection in accepter.accept():
                    spawn(serve_connection(server, connection), self._tasks)
            except ConnectionAbortedError:
                continue
            except OSError as error:
                accepter.refuse()
                self._warn("connections are refused: %s", error)
                await asyncio.sleep(PAUSE_S)


def bind(host: str, port: int, what: str) -> socket.socket:
    """Binds a TCP socket, without listening yet.

    Args:
        host: Address.
        port: 0 for a free port.
        what: Named in the error, e.g. "admin endpoints".

    Raises:
        StartupError: The address or port is not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if sys.platform != "win32":  # on Windows it would allow two servers on one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise StartupError(f"cannot serve {what} on {host}:{port}: {error}") from error
    return listener


def listen(listener: socket.socket, what: str) -> Accepter:
    """Listens on a bound socket and logs the URL at which something is served.

    Raises:
        StartupError: Another server has begun to listen on the port since it was bound.
    """
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    try:
        listener.listen(_BACKLOG)
    except OSError as error:
        raise StartupError(f"cannot serve {what} on {host}:{port}: {error}") from error
    listener.setblocking(False)
    logger.info("%s on http://%s:%d", what, shown, port)
    return Accepter(listener)
