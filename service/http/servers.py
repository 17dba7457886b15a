"""The HTTP servers of one process: the main server and the optional admin server."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal, Protocol, cast

import uvicorn
from fastapi import FastAPI

from service.errors import Draining, StartupError
from service.http.app import create_admin_app, create_app
from service.http.connections import ConnectionGuard, raise_file_limit
from service.http.limits import ConnectionLimits, RequestBodies
from service.models.repository import Repository
from service.observe.metrics import Metrics
from service.protocol import Segmenter
from service.settings import Settings

logger = logging.getLogger(__name__)

FLUSH_S = 1.0
"""Time for clients to take their responses after a drain that has used all of its own; also for
admin requests still in flight after a drain."""
_SPARE_S = 2
"""How much later than the guard uvicorn cancels requests."""


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
        guard: The protocol factory in `config`.
        listeners: Bound sockets.
    """

    def __init__(
        self, config: uvicorn.Config, guard: ConnectionGuard, listeners: list[socket.socket]
    ) -> None:
        super().__init__(config)
        self.guard = guard
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
        """Finishes requests in flight, for a short time, and closes the sockets."""
        self.should_exit = True
        asyncio.get_running_loop().call_later(FLUSH_S, self.guard.abort)
        if self._task is not None:
            await self._task


class DrainingServer(uvicorn.Server):
    """Drains on the first SIGTERM or SIGINT: accepted work is finished before the sockets close.

    While draining, new work is answered 503 and the health routes still answer. A second signal
    shuts down immediately.

    Args:
        config: Configuration of the main server.
        guard: The protocol factory in `config`.
        drain_timeout_s: From the signal until the last connection is closed, seconds.
        admin: Started and stopped with this server.
        source: Provides the connections of both servers and handles signals; None: the sockets of
            `config`, and signal handlers of this process.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        guard: ConnectionGuard,
        drain_timeout_s: float,
        admin: AdminServer | None = None,
        source: ConnectionSource | None = None,
    ) -> None:
        super().__init__(config)
        self._guard = guard
        self._drain_timeout_s = drain_timeout_s
        self._drained_by_s = 0.0
        self._is_closing = False
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
        """Reports to the connection source; called by uvicorn every 0.1 s."""
        if self._source is not None:
            self._source.report()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops the connection source, then the admin server, then this server.

        What clients have not taken of their responses by the end of the drain is lost.
        """
        if self._source is not None:
            self._source.stop()
        self._is_closing = True
        left_s = max(FLUSH_S, self._drained_by_s - time.monotonic())
        asyncio.get_running_loop().call_later(left_s, self._guard.abort)
        if self._admin is not None:
            await self._admin.end()
        self.config.timeout_graceful_shutdown = math.ceil(left_s) + _SPARE_S
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
        if self._loop is None:
            super().handle_exit(sig, frame)
        elif self._drain_task is not None:
            self._drained_by_s = 0.0
            super().handle_exit(sig, frame)
            if self._is_closing:
                self._loop.call_soon_threadsafe(self._guard.abort)
        else:
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        if self._drain_task is None:
            self._drain_task = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        self._drained_by_s = time.monotonic() + self._drain_timeout_s
        app = self.config.app
        segmenter = getattr(getattr(app, "state", None), "segmenter", None)
        if segmenter is not None:
            logger.info("draining: %d images in flight", segmenter.admission.images)
            segmenter.admission.close()
            for guard in [self._guard, *([self._admin.guard] if self._admin else [])]:
                guard.refuse_bodies(Draining("the server is going down"))
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
    metrics: Metrics = app.state.metrics
    bodies = RequestBodies(settings.max_bodies_bytes)
    metrics.request_body_bytes.set_function(lambda: bodies.held)
    limits = ConnectionLimits.of(settings)
    raise_file_limit(settings.max_connections * (1 if settings.admin_port is None else 2))
    guard = ConnectionGuard(limits, bodies, metrics)
    config = _configure(app, guard, settings, host=settings.host, port=settings.port)
    timeout_s = settings.drain_timeout_s
    if settings.admin_port is None:
        return DrainingServer(config, guard, timeout_s, source=source)
    admin_guard = ConnectionGuard(limits, bodies, metrics)
    admin_config = _configure(create_admin_app(app), admin_guard, settings, lifespan="off")
    admin_config.timeout_graceful_shutdown = math.ceil(FLUSH_S) + _SPARE_S
    listeners = []
    if source is None:
        listeners.append(bind(settings.admin_host, settings.admin_port, "admin endpoints"))
        log_address(listeners[0], "admin endpoints")
    admin = AdminServer(admin_config, admin_guard, listeners)
    return DrainingServer(config, guard, timeout_s, admin, source)


def _configure(
    app: FastAPI,
    guard: ConnectionGuard,
    settings: Settings,
    *,
    lifespan: Literal["on", "off"] = "on",
    host: str = "",
    port: int = 0,
) -> uvicorn.Config:
    """Configuration of a server; without `host` it is given its sockets or connections."""
    return uvicorn.Config(
        app,
        http=cast(type[asyncio.Protocol], guard),  # uvicorn only calls it
        ws="none",
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        lifespan=lifespan,
        server_header=False,
        timeout_keep_alive=math.ceil(settings.keep_alive_s),
    )


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
