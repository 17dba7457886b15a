"""Limits the number of connections, and closes those that send no request.

A connection above the limit is cheap: its first bytes are answered with 503, without an HTTP
parser, a task or the application. Health and metrics routes are exempt, so that an overloaded
server does not look like a dead one.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from typing import Any, cast

from uvicorn.config import Config
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.server import ServerState

from service.errors import Overloaded, build_error_body, describe_error
from service.observe.metrics import Metrics

logger = logging.getLogger(__name__)

REASON = "connections"
_EXEMPT = (b"GET /healthz ", b"GET /v2/health/", b"GET /metrics ")
_LINGER_S = 2.0
"""Lifetime of a rejected connection: closing earlier could reset it before the response is read."""
_RESERVED_FILES = 200
"""File descriptors needed besides connections."""


class ConnectionLimit:
    """Protocol factory for uvicorn: its own protocol up to the limit, above it `Rejection`.

    Args:
        max_connections: Most connections served at once. The same number may be in rejection at
            once; further ones are closed without a response.
        retry_after_s: Retry-After of a rejection, seconds.
        metrics: Counts rejections.
        serve: Factory of the serving protocol; default: uvicorn's.
    """

    def __init__(
        self,
        max_connections: int,
        retry_after_s: int,
        metrics: Metrics,
        serve: Callable[..., asyncio.Protocol] = AutoHTTPProtocol,
    ) -> None:
        self.max_connections = max_connections
        self.rejected: set[Rejection] = set()
        self._serve = serve
        self._rejections = metrics.rejections.labels(REASON)
        self._retry_after_s = retry_after_s
        self._connections: set[Any] = set()
        self._silent: dict[Any, Any] = {}

    def __call__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> asyncio.Protocol:
        """Returns the protocol of a new connection; called by uvicorn."""
        self._connections = server_state.connections

        def build() -> asyncio.Protocol:
            return self._serve(config, server_state, app_state, _loop)

        if len(self._connections) < self.max_connections:
            return build()
        return Rejection(self, build)

    def reject(self, path: str) -> bytes:
        """Counts a rejection and returns the complete response to a request for that path."""
        self._rejections.inc()
        text = f"the limit of {self.max_connections} connections is reached"
        status, detail = describe_error(Overloaded(text, REASON))
        body = build_error_body(detail, path)
        head = (
            f"HTTP/1.1 {status} Service Unavailable\r\n"
            "content-type: application/json\r\n"
            f"content-length: {len(body)}\r\n"
            f"retry-after: {self._retry_after_s}\r\n"
            "x-content-type-options: nosniff\r\n"
            "connection: close\r\n\r\n"
        )
        return head.encode() + body

    def close_silent(self) -> None:
        """Closes the connections without a request since the last call.

        uvicorn has a timeout for idle keep-alive connections, but none for connections that have
        sent nothing or only part of a request's head.
        """
        silent = {
            connection: connection.cycle
            for connection in self._connections
            if connection.cycle is None or connection.cycle.response_complete
        }
        for connection, cycle in silent.items():
            if connection in self._silent and self._silent[connection] is cycle:
                connection.transport.close()
        self._silent = silent


class Rejection(asyncio.Protocol):
    """Answers the first bytes with 503 and drops the rest; passes exempt routes to `serve`.

    Args:
        limit: Creates the response and tracks the rejected connections.
        serve: Factory of the serving protocol.
    """

    def __init__(self, limit: ConnectionLimit, serve: Callable[[], asyncio.Protocol]) -> None:
        self._limit = limit
        self._serve = serve
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None
        self._answered = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Starts the timeout; aborts if too many connections are in rejection."""
        # The cast is needed because uvloop's transport is no subclass of asyncio.Transport.
        self._transport = cast(asyncio.Transport, transport)
        if len(self._limit.rejected) >= self._limit.max_connections:
            self._limit.reject("")
            self._transport.abort()
            return
        self._limit.rejected.add(self)
        self._timer = asyncio.get_running_loop().call_later(_LINGER_S, self._transport.abort)

    def data_received(self, data: bytes) -> None:
        """Rejects or serves, depending on the first bytes; later data are dropped."""
        if self._answered:
            return
        if data.startswith(_EXEMPT):
            self._release()
            protocol = self._serve()
            self._transport.set_protocol(protocol)
            protocol.connection_made(self._transport)
            protocol.data_received(data)
        else:
            self._answered = True
            path = data.split(b" ", 2)[1:2]
            response = self._limit.reject(path[0].decode("latin-1") if path else "")
            self._transport.write(response)

    def connection_lost(self, exc: Exception | None) -> None:
        """Releases the connection and cancels its timeout."""
        self._release()

    def _release(self) -> None:
        self._limit.rejected.discard(self)
        if self._timer is not None:
            self._timer.cancel()


def raise_file_limit(max_connections: int) -> None:
    """Raises RLIMIT_NOFILE to what `max_connections` need; warns if the hard limit is lower."""
    if sys.platform == "win32":
        return
    import resource  # Unix only

    needed = 2 * max_connections + _RESERVED_FILES  # served and rejected
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        logger.warning(
            "%d connections may need %d open files, but the hard limit is %d",
            max_connections,
            needed,
            allowed,
        )
