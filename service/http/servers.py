"""The HTTP servers of one process: the main server and the optional admin server."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol, cast

import uvicorn

from service.errors import StartupError
from service.http.app import create_admin_app, create_app
from service.http.connections import ConnectionLimit, raise_file_limit
from service.models.repository import Repository
from service.protocol import Segmenter
from service.settings import Settings

logger = logging.getLogger(__name__)

_ADMIN_SHUTDOWN_S = 1
"""Timeout of admin requests still in flight when the drain has finished."""

_CLOSE_SILENT_TICKS = 300
"""Interval of `ConnectionLimit.close_silent`, in ticks of 0.1 s."""


class ConnectionSource(Protocol):
    """Provides connections to the servers instead of listening sockets."""

    async def start(self, main: DrainingServer, admin: AdminServer | None) -> None:
        """Starts passing connections to the servers; called in the event loop."""

    def report(self) -> None:
        """Called every 0.1 s."""

    def stop(self) -> None:
        """Stops accepting connections."""


class AdminServer(uvicorn.Server):
    """Serves the admin endpoints in the event loop of the main server, which controls it.

    Args:
        config: With `lifespan="off"`: the main server runs the application's lifespan.
        listeners: Bound sockets.
    """

    def __init__(self, config: uvicorn.Config, listeners: list[socket.socket]) -> None:
        super().__init__(config)
        self._listeners = listeners
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to the main server."""
        yield

    def begin(self) -> None:
        """Starts serving in a task of the running event loop."""
        serving = self.serve(sockets=self._listeners)
        self._task = asyncio.get_running_loop().create_task(serving, name="admin")

    async def end(self) -> None:
        """Finishes requests in flight and closes the sockets."""
        self.should_exit = True
        if self._task is not None:
            await self._task


class DrainingServer(uvicorn.Server):
    """Drains on the first SIGTERM or SIGINT: accepted work is finished before the sockets close.

    While draining, new work is answered 503 and the health routes still answer. A second signal
    shuts down immediately.

    Args:
        config: Configuration of the main server.
        limit: The protocol factory in `config`.
        admin: Started and stopped with this server.
        source: Provides the connections of both servers and handles signals; None: the sockets of
            `config`, and signal handlers of this process.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        limit: ConnectionLimit,
        admin: AdminServer | None = None,
        source: ConnectionSource | None = None,
    ) -> None:
        super().__init__(config)
        self._limit = limit
        self._admin = admin
        self._source = source
        self._drain_task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts this server, then the admin server, then the connection source."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets if self._source is None else [])
        if self._admin is not None:
            self._admin.begin()  # after the application's startup, which it depends on
        if self._source is not None:
            await self._source.start(self, self._admin)

    async def on_tick(self, counter: int) -> bool:
        """Closes silent connections; called by uvicorn every 0.1 s."""
        if counter % _CLOSE_SILENT_TICKS == 0:
            self._limit.close_silent()
        if self._source is not None:
            self._source.report()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops the connection source, then the admin server, then this server."""
        if self._source is not None:
            self._source.stop()
        if self._admin is not None:
            await self._admin.end()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Installs uvicorn's signal handlers, unless the connection source handles signals."""
        if self._source is not None:
            yield
            return
        with super().capture_signals():
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Schedules the drain; called in a signal handler."""
        if self._loop is None or self._drain_task is not None:
            super().handle_exit(sig, frame)
        else:
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        if self._drain_task is None:
            self._drain_task = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        app = self.config.app
        segmenter = getattr(getattr(app, "state", None), "segmenter", None)
        if segmenter is not None:
            logger.info("draining: %d images in flight", segmenter.admission.images)
            if not await segmenter.finish_accepted():
                await segmenter.give_up()
        self.should_exit = True


def build_server(
    settings: Settings,
    repository: Repository,
    segmenter: Segmenter | None = None,
    source: ConnectionSource | None = None,
) -> DrainingServer:
    """Builds the main server, and the admin server if `admin_port` is set.

    Args:
        settings: The server's settings.
        repository: Loaded models.
        segmenter: Default: one for the repository.
        source: Provides the connections; default: the ports of the settings.

    Raises:
        StartupError: A port cannot be bound, or the application cannot be built.
    """
    app = create_app(settings, repository, segmenter=segmenter)
    limit = ConnectionLimit(settings.max_connections, settings.retry_after_s, app.state.metrics)
    raise_file_limit(settings.max_connections)
    config = uvicorn.Config(
        app,
        http=cast(type[asyncio.Protocol], limit),  # uvicorn only calls it
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s)),
    )
    if settings.admin_port is None:
        return DrainingServer(config, limit, source=source)
    admin_config = uvicorn.Config(
        create_admin_app(app),
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=_ADMIN_SHUTDOWN_S,
    )
    listeners = []
    if source is None:
        listeners.append(bind(settings.admin_host, settings.admin_port, "admin endpoints"))
        log_address(listeners[0], "admin endpoints")
    return DrainingServer(config, limit, AdminServer(admin_config, listeners), source)


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


def log_address(listener: socket.socket, what: str) -> None:
    """Logs the URL at which something is served."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    logger.info("%s on http://%s:%d", what, shown, port)
