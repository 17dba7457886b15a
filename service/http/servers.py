"""The HTTP servers of one process: the main server and the optional admin server."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Literal, Protocol, cast

import uvicorn
from fastapi import FastAPI
from starlette.datastructures import State

from service.errors import Draining
from service.http.app import create_admin_app, create_app
from service.http.connections import ConnectionGuard, raise_file_limit
from service.http.limits import RequestBodies
from service.http.listeners import Listeners
from service.http.reload import Reloader
from service.http.signals import END_S, EXIT_SIGNALS, handle_exit_signals
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
    """Provides connections to the servers.

    Attributes:
        has_signals: Whether it passes signals on to the main server, which else handles those of
            the process.
    """

    has_signals: bool

    async def start(self, main: DrainingServer, admin: AdminServer | None) -> None:
        """Starts passing connections to the servers; called in the event loop."""

    def stop(self) -> None:
        """Stops accepting connections."""


class FrontEnd(Protocol):
    """Another way to the same segmenter, in the event loop of the main server."""

    async def start(self, state: State) -> None:
        """Serves.

        Args:
            state: Of the application, which has started.
        """

    async def stop(self, limit_s: float) -> None:
        """Takes no more requests, and ends those in flight after a time."""


class AdminServer(uvicorn.Server):
    """Serves the admin endpoints in the event loop of the main server, which controls it.

    Args:
        config: With `lifespan="off"`: the main server runs the application's lifespan.
        guard: The protocol factory in `config`.
    """

    def __init__(self, config: uvicorn.Config, guard: ConnectionGuard) -> None:
        super().__init__(config)
        self.guard = guard
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to the main server."""
        yield

    def begin(self) -> None:
        """Starts serving in a task of the running event loop."""
        serving = self.serve(sockets=[])
        self._task = asyncio.get_running_loop().create_task(serving, name="admin")

    async def end(self) -> None:
        """Finishes requests in flight, for a short time, and closes the sockets."""
        self.should_exit = True
        asyncio.get_running_loop().call_later(FLUSH_S, self.guard.abort)
        if self._task is not None:
            await self._task


class DrainingServer(uvicorn.Server):
    """Drains on a signal to exit: accepted work is finished before the sockets close.

    While draining, new work is answered 503 and the health routes still answer. SIGHUP reloads.
    It also drains when the segmenter has failed for good, so that the process can be replaced.

    Args:
        config: Configuration of the main server.
        guard: The protocol factory in `config`.
        drain_timeout_s: From the signal until the last connection is closed, seconds.
        admin: Started and stopped with this server.
        fronts: As `admin`.
        source: Provides the connections of both servers.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        guard: ConnectionGuard,
        drain_timeout_s: float,
        source: ConnectionSource,
        admin: AdminServer | None = None,
        fronts: Sequence[FrontEnd] = (),
    ) -> None:
        super().__init__(config)
        self._fronts = fronts
        self._guard = guard
        self._drain_timeout_s = drain_timeout_s
        self._drained_by_s = 0.0
        self._admin = admin
        self._source = source
        self._drain_task: asyncio.Task[None] | None = None
        self._state = cast(FastAPI, config.app).state
        self._reloader = Reloader(self._state)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def failure(self) -> str | None:
        """Why the process must be replaced; None while it need not be."""
        segmenter: Segmenter | None = getattr(self._state, "segmenter", None)
        return None if segmenter is None else segmenter.failure

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts this server, then the admin server, then the connection source."""
        self._loop = asyncio.get_running_loop()
        await super().startup([])
        if self._admin is not None:
            self._admin.begin()  # after the application's startup, which it depends on
        for front in self._fronts:
            await front.start(self._state)
        await self._source.start(self, self._admin)

    async def on_tick(self, counter: int) -> bool:
        """Drains if the segmenter has failed for good; called by uvicorn every 0.1 s."""
        if not self._source.has_signals and self._drain_task is None and self.failure is not None:
            signal.raise_signal(signal.SIGTERM)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops the connection source, then the admin server, then this server.

        What clients have not taken of their responses by the end of the drain is lost.
        """
        self._source.stop()
        await asyncio.gather(*(front.stop(FLUSH_S) for front in self._fronts))
        left_s = max(FLUSH_S, self._drained_by_s - time.monotonic())
        asyncio.get_running_loop().call_later(left_s, self._guard.abort)
        if self._admin is not None:
            await self._admin.end()
        self.config.timeout_graceful_shutdown = math.ceil(left_s) + _SPARE_S
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles the process's signals, unless the connection source does."""
        if self._source.has_signals:
            yield
            return
        with handle_exit_signals(self.handle_signal, self._state.settings.drain_timeout_s + END_S):
            yield

    def handle_signal(self, number: int) -> None:
        """Schedules the drain, or reloading keys and models; called in a signal handler."""
        if self._loop is None:  # it has not begun to serve
            self.should_exit = self.should_exit or number in EXIT_SIGNALS
        else:
            act = self._begin_drain if number in EXIT_SIGNALS else self._reloader.start
            self._loop.call_soon_threadsafe(act)

    def _begin_drain(self) -> None:
        if self._drain_task is None:
            self._drain_task = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        self._drained_by_s = time.monotonic() + self._drain_timeout_s
        segmenter: Segmenter = self._state.segmenter
        logger.info("draining: %d images in flight", segmenter.admission.images)
        segmenter.admission.close()
        for guard in [self._guard, *([self._admin.guard] if self._admin else [])]:
            guard.refuse_bodies(Draining("the server is going down"))
        if not await segmenter.finish_accepted():
            await segmenter.give_up()
        self.should_exit = True


def serve_beside(app: FastAPI, fronts: Sequence[FrontEnd], limit_s: float) -> None:
    """Has front ends serve as long as an application whose server is another's.

    Args:
        app: Starts before them, and ends after them.
        fronts: The front ends.
        limit_s: Time for the requests in flight at the end.
    """
    run_app = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with run_app(app):
            for front in fronts:
                await front.start(app.state)
            try:
                yield
            finally:
                await asyncio.gather(*(front.stop(limit_s) for front in fronts))

    app.router.lifespan_context = lifespan


def freeze_imports() -> None:
    """Excludes what exists now, mostly modules, from garbage collection.

    A full collection would hold the event loop for 40 ms. Models must be loaded later.
    """
    gc.freeze()


def build_server(
    settings: Settings,
    repository: Repository,
    segmenter: Segmenter | None = None,
    source: ConnectionSource | None = None,
    fronts: Sequence[FrontEnd] = (),
) -> DrainingServer:
    """Builds the main server, and the admin server if `admin_port` is set.

    Args:
        settings: The server's settings.
        repository: Loaded models.
        segmenter: Default: one for the repository.
        source: Provides the connections; default: listens on the ports of the settings.
        fronts: Other front ends.

    Raises:
        StartupError: A port cannot be bound, or the application cannot be built.
    """
    app = create_app(settings, repository, segmenter=segmenter)
    metrics: Metrics = app.state.metrics
    bodies = app.state.bodies = RequestBodies(settings.max_bodies_bytes)
    metrics.follow(metrics.request_body_bytes, lambda: bodies.held)
    raise_file_limit(settings.max_connections * (1 if settings.admin_port is None else 2))
    if source is None:
        source = Listeners(settings)
    guard = ConnectionGuard(settings, bodies, metrics, settings.cors_origins)
    config = _configure(app, guard, settings)
    timeout_s = settings.drain_timeout_s
    if settings.admin_port is None:
        return DrainingServer(config, guard, timeout_s, source, fronts=fronts)
    admin_guard = ConnectionGuard(settings, bodies, metrics)
    admin_config = _configure(create_admin_app(app), admin_guard, settings, lifespan="off")
    admin_config.timeout_graceful_shutdown = math.ceil(FLUSH_S) + _SPARE_S
    admin = AdminServer(admin_config, admin_guard)
    return DrainingServer(config, guard, timeout_s, source, admin, fronts)


def _configure(
    app: FastAPI,
    guard: ConnectionGuard,
    settings: Settings,
    *,
    lifespan: Literal["on", "off"] = "on",
) -> uvicorn.Config:
    """Configuration of a server that is given its connections."""
    return uvicorn.Config(
        app,
        http=cast(type[asyncio.Protocol], guard),  # uvicorn only calls it
        ws="none",
        log_config=None,
        access_log=False,
        lifespan=lifespan,
        forwarded_allow_ips=settings.trusted_proxies,
        server_header=False,
        timeout_keep_alive=math.ceil(settings.keep_alive_s),
    )
