"""The servers of one process: the main one, and beside it one for the admin endpoints."""

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
from service.http.connections import ConnectionLimit, allow_files
from service.models.repository import Repository
from service.protocol import Segmenter
from service.settings import Settings

logger = logging.getLogger(__name__)

_ADMIN_END_S = 1
"""How long an admin request may take that is still in work when accepted images are finished."""

_TICKS_OF_SILENCE = 300
"""After this many tenths of a second a connection that has sent no request may be closed."""


class Intake(Protocol):
    """Where connections come from if not from a socket that listens."""

    async def start(self, main: DrainingServer, admin: AdminServer | None) -> None:
        """Gives the servers the connections that come; needs a running event loop."""

    def report(self) -> None:
        """Called ten times a second."""

    def stop(self) -> None:
        """Takes no more."""


class AdminServer(uvicorn.Server):
    """Serves in the event loop of another server, which alone hears signals and ends this one.

    Args:
        config: Without a lifespan: the application's is the other server's.
        listeners: Its sockets.
    """

    def __init__(self, config: uvicorn.Config, listeners: list[socket.socket]) -> None:
        super().__init__(config)
        self._listeners = listeners
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """See uvicorn; the other server has them."""
        yield

    def begin(self) -> None:
        """Starts serving."""
        serving = self.serve(sockets=self._listeners)
        self._task = asyncio.get_running_loop().create_task(serving, name="admin")

    async def end(self) -> None:
        """Answers what is in work and closes the socket."""
        self.should_exit = True
        if self._task is not None:
            await self._task


class DrainingServer(uvicorn.Server):
    """On the first SIGTERM or SIGINT accepted work is finished before the sockets close.

    Until then new work is answered 503 and the health routes go on to answer; a second signal
    does not wait.

    Args:
        config: The server's.
        limit: What its connections are made with.
        admin: Serves as long as this one does.
        intake: Gives both their connections, and hears the signals; None: the system does.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        limit: ConnectionLimit,
        admin: AdminServer | None = None,
        intake: Intake | None = None,
    ) -> None:
        super().__init__(config)
        self._limit = limit
        self._admin = admin
        self._intake = intake
        self._drain_task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets if self._intake is None else [])
        if self._admin is not None:
            self._admin.begin()  # what it serves is there now
        if self._intake is not None:
            await self._intake.start(self, self._admin)

    async def on_tick(self, counter: int) -> bool:
        """See uvicorn, which calls this ten times a second."""
        if counter % _TICKS_OF_SILENCE == 0:
            self._limit.close_silent()
        if self._intake is not None:
            self._intake.report()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        if self._intake is not None:
            self._intake.stop()
        if self._admin is not None:
            await self._admin.end()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """See uvicorn."""
        if self._intake is not None:
            yield
            return
        with super().capture_signals():
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Starts draining; called by a signal, so it only schedules."""
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
            logger.info("draining: %d images are in flight", segmenter.admission.images)
            if not await segmenter.finish_accepted():
                await segmenter.give_up()
        self.should_exit = True


def build_server(
    settings: Settings,
    repository: Repository,
    segmenter: Segmenter | None = None,
    intake: Intake | None = None,
) -> DrainingServer:
    """The process's server, with another one for the admin endpoints if they have a port.

    Args:
        settings: Everything that can be set.
        repository: Loaded models.
        segmenter: Does the work; default: one for the repository.
        intake: Where connections come from; default: the ports of the settings.

    Raises:
        StartupError: A port cannot be had, or the application cannot be built.
    """
    app = create_app(settings, repository, segmenter=segmenter)
    limit = ConnectionLimit(settings.max_connections, settings.retry_after_s, app.state.metrics)
    allow_files(settings.max_connections)
    config = uvicorn.Config(
        app,
        http=cast(type[asyncio.Protocol], limit),  # it is only ever called
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s)),
    )
    if settings.admin_port is None:
        return DrainingServer(config, limit, intake=intake)
    admin_config = uvicorn.Config(
        create_admin_app(app),
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=_ADMIN_END_S,
    )
    listeners = []
    if intake is None:
        listeners.append(bind(settings.admin_host, settings.admin_port, "admin endpoints"))
        log_address(listeners[0], "admin endpoints")
    return DrainingServer(config, limit, AdminServer(admin_config, listeners), intake)


def bind(host: str, port: int, what: str) -> socket.socket:
    """A TCP socket that does not listen yet.

    Args:
        host: Address.
        port: 0 takes a free one.
        what: Is served there, for the error.

    Raises:
        StartupError: The port cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if sys.platform != "win32":  # there it would let two servers have one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise StartupError(f"cannot serve {what} on {host}:{port}: {error}") from error
    return listener


def log_address(listener: socket.socket, what: str) -> None:
    """Says where something is served."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    logger.info("%s on http://%s:%d", what, shown, port)
