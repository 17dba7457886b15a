"""All connections of one server: their number, their timeouts, and their end."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from typing import Any

from uvicorn.config import Config
from uvicorn.server import ServerState

from service.errors import Overloaded, ServiceError
from service.http.guard import GuardedProtocol
from service.http.limits import RequestBodies, return_free_memory
from service.http.refusals import get_reason
from service.observe.metrics import Metrics
from service.settings import Settings

logger = logging.getLogger(__name__)

REASON = "connections"
_SERVED_IN_EXCESS = frozenset((b"/healthz", b"/v2/health/live", b"/v2/health/ready", b"/metrics"))
_MAX_SERVED_IN_EXCESS = 16
"""Requests of connections above the limit that are served at once."""
_CHECK_S = 0.25
"""Time between checks of the connections' timeouts."""
_RESERVED_FILES = 200
"""File descriptors needed besides connections."""


class ConnectionGuard:
    """Protocol factory for uvicorn, and the owner of a server's connections.

    Up to `max_connections` are served. As many more may be open, each for one request: health
    and metrics routes are answered, so that an overloaded server does not look like a dead one,
    everything else gets 503. Beyond that the oldest one that is not being answered is closed.

    Args:
        settings: The number of connections, and the limits of each.
        bodies: Counts the bytes of bodies; may be shared by the servers of a process.
        metrics: Counts rejections.
        cors_origins: As in the settings.
    """

    def __init__(
        self,
        settings: Settings,
        bodies: RequestBodies,
        metrics: Metrics,
        cors_origins: str = "",
    ) -> None:
        self.settings = settings
        self.cors_origins = cors_origins
        self.bodies = bodies
        self._rejections = metrics.rejections
        self._served: set[GuardedProtocol] = set()
        self._excess: dict[GuardedProtocol, None] = {}  # oldest first
        self._timer: asyncio.TimerHandle | None = None

    def __call__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> asyncio.Protocol:
        """Returns the protocol of a new connection; called by uvicorn."""
        return GuardedProtocol(self, config, server_state, app_state, _loop)

    def add(self, connection: GuardedProtocol) -> bool:
        """Takes a new connection; whether it is within the limit."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_CHECK_S, self._check)
        if len(self._served) < self.settings.max_connections:
            self._served.add(connection)
            return True
        if len(self._excess) >= self.settings.max_connections:
            waiting = (other for other in self._excess if not other.is_answering)
            oldest = next(waiting, connection)
            self._excess.pop(oldest, None)
            self.count(self.build_rejection())
            oldest.transport.abort()
        self._excess[connection] = None
        return False

    def discard(self, connection: GuardedProtocol) -> None:
        """Forgets a connection that is closed."""
        self._served.discard(connection)
        self._excess.pop(connection, None)

    def may_serve_excess(self, method: bytes, target: bytes) -> bool:
        """Whether a request is served on a connection above the limit."""
        if method not in (b"GET", b"HEAD") or target.partition(b"?")[0] not in _SERVED_IN_EXCESS:
            return False
        return sum(other.is_answering for other in self._excess) < _MAX_SERVED_IN_EXCESS

    def build_rejection(self) -> ServiceError:
        """The error of a request above the limit of connections."""
        text = f"the limit of {self.settings.max_connections} connections is reached"
        return Overloaded(text, REASON)

    def count(self, error: ServiceError) -> None:
        """Counts a refusal that the application does not see."""
        self._rejections.labels(get_reason(error)).inc()
        logger.debug("a request was refused: %s", error)

    def refuse_bodies(self, error: ServiceError) -> None:
        """Refuses every request whose body is not complete."""
        for connection in (*self._served, *self._excess):
            connection.refuse_body(error)

    def abort(self) -> None:
        """Closes every connection at once."""
        for connection in (*self._served, *self._excess):
            connection.transport.abort()

    def _check(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        if self.bodies.has_shrunk():
            loop.run_in_executor(None, return_free_memory)
        connections = (*self._served, *self._excess)
        if connections:
            self._timer = loop.call_later(_CHECK_S, self._check)
        now_s = time.monotonic()
        for connection in connections:
            connection.check(now_s)


def raise_file_limit(max_connections: int) -> None:
    """Raises RLIMIT_NOFILE to what `max_connections` need; warns if the hard limit is lower."""
    if sys.platform == "win32":
        return
    import resource  # Unix only

    needed = 2 * max_connections + _RESERVED_FILES  # within the limit and above
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
