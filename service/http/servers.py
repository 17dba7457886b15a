"""The HTTP servers of one process: the main server and the optional admin server."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, cast

import uvicorn
from fastapi import FastAPI

from service.http.app import create_admin_app, create_app
from service.http.connections import ConnectionLimit, raise_file_limit
from service.http.listeners import Listeners
from service.http.reload import Reloader
from service.http.signals import END_S, EXIT_SIGNALS, handle_exit_signals
from service.models.repository import Repository
from service.protocol import Segmenter
from service.settings import Settings

logger = logging.getLogger(__name__)

_ADMIN_SHUTDOWN_S = 1
"""Timeout of admin requests still in flight when the drain has finished."""

_CLOSE_SILENT_TICKS = 300
"""Interval of `ConnectionLimit.close_silent`, in ticks of 0.1 s."""


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


class AdminServer(uvicorn.Server):
    """Serves the admin endpoints in the event loop of the main server, which controls it.

    Args:
        config: With `lifespan="off"`: the main server runs the application's lifespan.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
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
        """Finishes requests in flight and closes the sockets."""
        self.should_exit = True
        if self._task is not None:
            await self._task


class DrainingServer(uvicorn.Server):
    """Drains on a signal to exit: accepted work is finished before the sockets close.

    While draining, new work is answered 503 and the health routes still answer. SIGHUP reloads.
    It also drains when the segmenter has failed for good, so that the process can be replaced.

    Args:
        config: Configuration of the main server.
        limit: The protocol factory in `config`.
        admin: Started and stopped with this server.
        source: Provides the connections of both servers.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        limit: ConnectionLimit,
        source: ConnectionSource,
        admin: AdminServer | None = None,
    ) -> None:
        super().__init__(config)
        self._limit = limit
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
        await self._source.start(self, self._admin)

    async def on_tick(self, counter: int) -> bool:
        """Closes silent connections; called by uvicorn every 0.1 s."""
        if counter % _CLOSE_SILENT_TICKS == 0:
            self._limit.close_silent()
        if not self._source.has_signals and self._drain_task is None and self.failure is not None:
            signal.raise_signal(signal.SIGTERM)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops the connection source, then the admin server, then this server."""
        self._source.stop()
        if self._admin is not None:
            await self._admin.end()
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
        segmenter: Segmenter = self._state.segmenter
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
        source: Provides the connections; default: listens on the ports of the settings.

    Raises:
        StartupError: A port cannot be bound, or the application cannot be built.
    """
    app = create_app(settings, repository, segmenter=segmenter)
    limit = ConnectionLimit(settings.max_connections, settings.retry_after_s, app.state.metrics)
    raise_file_limit(settings.max_connections)
    config = uvicorn.Config(
        app,
        http=cast(type[asyncio.Protocol], limit),  # uvicorn only calls it
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s)),
    )
    if source is None:
        source = Listeners(settings)
    if settings.admin_port is None:
        return DrainingServer(config, limit, source)
    admin_config = uvicorn.Config(
        create_admin_app(app),
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=_ADMIN_SHUTDOWN_S,
    )
    return DrainingServer(config, limit, source, AdminServer(admin_config))
