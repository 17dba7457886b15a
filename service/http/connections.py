"""Connections: how many at once, and how long one may stay without a request.

Beyond the limit a connection costs almost nothing: it is answered 503 as soon as its first bytes
are here, without an HTTP parser, a task or the application. Only who asks for the server's health
or metrics is served all the same, for an overloaded server must not look like a dead one.
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
_ALWAYS_SERVED = (b"GET /healthz ", b"GET /v2/health/", b"GET /metrics ")
_LINGER_S = 2.0
"""How long a connection that was turned away may still send, so that its client sees the answer."""
_SPARE_FILES = 200
"""Files that the process needs besides its connections."""


class ConnectionLimit:
    """What uvicorn makes a protocol with: its own up to the limit, beyond it one that refuses.

    Args:
        max_connections: Connections served at once. As many more may be waiting to be turned
            away; what comes on top of these is closed without an answer.
        retry_after_s: What a refusal says, seconds.
        metrics: Where rejections are counted.
        serve: Makes the protocol that serves; default: uvicorn's.
    """

    def __init__(
        self,
        max_connections: int,
        retry_after_s: int,
        metrics: Metrics,
        serve: Callable[..., asyncio.Protocol] = AutoHTTPProtocol,
    ) -> None:
        self.max_connections = max_connections
        self.refusals: set[Refusal] = set()
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
        """The protocol of a new connection; called by uvicorn."""
        self._connections = server_state.connections

        def build() -> asyncio.Protocol:
            return self._serve(config, server_state, app_state, _loop)

        if len(self._connections) < self.max_connections:
            return build()
        return Refusal(self, build)

    def refuse(self, path: str) -> bytes:
        """Counts a rejection; the whole response to a request for that path."""
        self._rejections.inc()
        text = f"{self.max_connections} connections are open, the server takes no more"
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
        """Closes the connections that have had no request since the last call.

        Keep-alive connections are closed sooner, by uvicorn; these have sent nothing or only a
        part of a request's head, and would hold their place for ever.
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


class Refusal(asyncio.Protocol):
    """Answers the first bytes 503 and drops what follows, or hands health routes over.

    Args:
        limit: Has made it; knows the answer, and the others of its kind.
        serve: Makes the protocol that serves.
    """

    def __init__(self, limit: ConnectionLimit, serve: Callable[[], asyncio.Protocol]) -> None:
        self._limit = limit
        self._serve = serve
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None
        self._answered = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Waits for the request, but not for long."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it
        if len(self._limit.refusals) >= self._limit.max_connections:
            self._limit.refuse("")
            self._transport.abort()
            return
        self._limit.refusals.add(self)
        self._timer = asyncio.get_running_loop().call_later(_LINGER_S, self._transport.abort)

    def data_received(self, data: bytes) -> None:
        """Decides by the first bytes; the rest is dropped."""
        if self._answered:
            return
        if data.startswith(_ALWAYS_SERVED):
            self._leave()
            protocol = self._serve()
            self._transport.set_protocol(protocol)
            protocol.connection_made(self._transport)
            protocol.data_received(data)
        else:
            self._answered = True
            path = data.split(b" ", 2)[1:2]
            answer = self._limit.refuse(path[0].decode("latin-1") if path else "")
            self._transport.write(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the connection."""
        self._leave()

    def _leave(self) -> None:
        self._limit.refusals.discard(self)
        if self._timer is not None:
            self._timer.cancel()


def allow_files(max_connections: int) -> None:
    """Raises the process's limit of open files to what that many connections need, if it may."""
    if sys.platform == "win32":
        return
    import resource  # not everywhere

    needed = 2 * max_connections + _SPARE_FILES  # served, and waiting to be turned away
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        logger.warning(
            "%d connections may need %d open files, the system allows %d",
            max_connections,
            needed,
            allowed,
        )
