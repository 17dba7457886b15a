"""The protocol of one connection: uvicorn's, with bounds on what a client may send and take.

Every bound is checked here, before and beside the application:

- The request line and headers together, their number, and the time they take.
- The rate and time of a body, the framing of a chunked one, and the bytes of all bodies in memory.
- The rate at which a client takes its response, and the time between two requests.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, Any, cast

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from service.errors import HeadTimeout, HeadTooLarge, InvalidRequest, ServiceError
from service.http.cors import build_cors_headers
from service.http.parser import Refused, RequestParser
from service.http.refusals import REFUSAL, build_response
from service.http.request_head import check_head
from service.http.timeouts import BodyTimer, ResponseTimer
from service.http.transport import GuardedTransport

if TYPE_CHECKING:
    from uvicorn._types import (
        ASGI3Application,
        ASGIReceiveCallable,
        ASGISendCallable,
        ASGISendEvent,
        Scope,
    )

    from service.http.connections import ConnectionGuard

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 65_536
"""Request line and headers, line ends included; also what the framing of a chunked body may add."""
MAX_HEADERS = 200
_BODY_PER_FRAMING = 4
"""Body bytes of a chunked body that allow one byte more of framing."""
_IDLE, _HEAD, _BODY = "no request", "request line and headers", "body"
"""What the next bytes of a connection belong to. In Python 3.11 an Enum is slow to access."""
_MAX_PIPELINED = 16
"""Requests that may wait behind the one in work."""
_LINGER_S = 2.0
"""How long a client may send nothing before its connection is closed: a reset while it sends could
overtake the response."""
_MAX_LINGER_S = 30.0
"""How long it may go on sending, and at most as many bytes as a body may have."""
_EXCESS_HEAD_TIMEOUT_S = 2.0
_UNSENT_BYTES = 131_072
"""Bytes that the system holds unsent. By default it takes megabytes at once, so that for a minute
a slow client would not seem to take anything."""
_PROBE_S = (0.01, 0.05, 0.25, 1.0, 4.0, 15.0, 60.0, 240.0)
"""Times between `GuardedTransport.send_ahead`."""


class GuardedProtocol(HttpToolsProtocol):
    """A connection whose limits are those of its guard.

    Args:
        guard: Of the server.
        config: uvicorn's, as the other arguments.
    """

    transport: GuardedTransport
    parser: RequestParser  # type: ignore[assignment]

    def __init__(
        self,
        guard: ConnectionGuard,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, loop)
        self.parser = RequestParser(self)
        self._guard = guard
        self._settings = guard.settings
        self.url = b""
        self.headers = []
        self._is_excess = False
        self._phase = _HEAD
        self._since_s = time.monotonic()  # the phase began
        self._fed = 0  # bytes of this request, its body included
        self._received = 0  # bytes of its body
        self._began_in_piece = False
        self._chunks: list[bytes] = []  # of its body, from the current piece
        self._held: deque[int] = deque()  # body bytes in memory, of each unanswered request
        self._body_timer = BodyTimer(guard.settings)
        self._response_timer = ResponseTimer(guard.settings)
        self._running: RequestResponseCycle | None = None  # not the newest of pipelined requests
        self._is_deaf = False  # what still arrives is dropped
        self._dropped = 0  # bytes
        self._linger_since_s: float | None = None
        self._probe: asyncio.TimerHandle | None = None

    @property
    def is_answering(self) -> bool:
        """Whether a request has no complete response yet."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def arriving_bytes(self) -> int:
        """Bytes held of the body that is not complete."""
        return self._held[-1] if self._held and self._phase is _BODY else 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Takes a place of the guard; without one the connection serves health routes alone."""
        # The cast is needed because uvloop's transport is no subclass of asyncio.Transport.
        guarded = GuardedTransport(cast(asyncio.Transport, transport), self._close)
        super().connection_made(guarded)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            connection = transport.get_extra_info("socket")
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        self._since_s = time.monotonic()
        self._is_excess = not self._guard.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Gives the place and the memory back."""
        self._guard.discard(self)
        self._guard.bodies.complete(self)
        self._guard.bodies.release(sum(self._held))
        self._held.clear()
        if self._probe is not None:
            self._probe.cancel()
        self.pipeline.clear()
        if self._running is not None:  # uvicorn tells the newest request alone
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parses, in pieces that end where the head must have ended."""
        if self._is_deaf:
            self._since_s = time.monotonic()
            self._dropped += len(data)
            if self._linger_since_s is not None and self._dropped > self._settings.max_body_bytes:
                self.transport.abort()
            return
        self._unset_keepalive_if_required()
        start = 0
        while start < len(data) and not self._is_deaf:
            if self._phase is _IDLE:
                self._begin_head()
            room = MAX_HEAD_BYTES - self._fed if self._phase is _HEAD else MAX_HEAD_BYTES
            piece = data[start : start + room]
            start += len(piece)
            self._feed(piece)

    def _begin_head(self) -> None:
        self._phase = _HEAD
        self._since_s = time.monotonic()
        self._fed = 0
        self.url = b""

    def _feed(self, piece: bytes) -> None:
        self._began_in_piece = False
        try:
            self.parser.feed(piece)
        except ServiceError as error:
            self._chunks.clear()
            if not self._is_deaf:
                self._fail(error)
            return
        self._take_body()
        if self._began_in_piece:
            return  # its share of the piece is not known
        self._fed += len(piece)
        if self._phase is _HEAD and self._fed >= MAX_HEAD_BYTES:
            self._fail(HeadTooLarge(f"the request line and headers exceed {MAX_HEAD_BYTES} bytes"))
        elif self._phase is _BODY:
            framing = self._fed - self._received
            if framing > MAX_HEAD_BYTES + self._received // _BODY_PER_FRAMING:
                self._fail(InvalidRequest(f"{framing} bytes frame a body of {self._received}"))

    def _take_body(self) -> None:
        """Counts what a piece has of a body; drops it if the request is answered already."""
        if not self._chunks:
            return
        body = b"".join(self._chunks)  # of one, itself
        self._chunks.clear()
        self._received += len(body)
        if self._is_deaf or self.cycle.response_complete:
            return
        self._held[-1] += len(body)
        super().on_body(body)
        self._guard.bodies.add(self, len(body))

    # Called by the parser

    def on_message_begin(self) -> None:
        """Starts the counts of a request."""
        if self._is_deaf:
            raise Refused(InvalidRequest("the connection is being closed"))
        if self._phase is _IDLE:
            self._begin_head()
            self._began_in_piece = True
        self._received = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Bounds the number of headers, and of trailers."""
        if len(self.headers) == MAX_HEADERS:
            raise Refused(HeadTooLarge(f"the request has more than {MAX_HEADERS} headers"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Refuses a malformed request, and one that a connection above the limit may not send."""
        if self.parser.is_upgrade:
            return
        method = self.parser.get_method()
        wrong = check_head(method, self.parser.get_http_version(), self.headers)
        if wrong is not None:
            raise Refused(InvalidRequest(wrong))
        if self._is_excess and not self._guard.may_serve_excess(method, self.url):
            raise Refused(self._guard.build_rejection())
        if len(self.pipeline) == _MAX_PIPELINED:
            raise Refused(InvalidRequest(f"more than {_MAX_PIPELINED} pipelined requests"))
        super().on_headers_complete()
        self.headers = []  # of trailers, which are dropped
        self._phase = _BODY
        self._since_s = time.monotonic()
        self._body_timer.begin(self._since_s)
        self._held.append(0)
        if self._is_excess:
            self._finish_input()

    def on_body(self, body: bytes) -> None:
        """Collects it until the end of the piece; many small chunks then cost as one."""
        self._chunks.append(body)

    def on_message_complete(self) -> None:
        """The next bytes belong to another request."""
        if self.parser.is_upgrade:
            return
        self._take_body()
        if self._is_deaf:
            return
        self._phase = _IDLE
        self._since_s = time.monotonic()
        self._guard.bodies.complete(self)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Releases the body; called by uvicorn."""
        if self._held:  # else the connection is lost
            self._guard.bodies.release(self._held.popleft())
        if self._phase is _IDLE:
            self._since_s = time.monotonic()
        super().on_response_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle

        async def answer(
            scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable
        ) -> None:
            async def send_watched(message: ASGISendEvent) -> None:
                if cycle.more_body and message["type"] == "http.response.start":
                    cycle.keep_alive = False  # the rest of the body is not waited for
                await send(message)

            await app(scope, receive, send_watched)

        super()._start_asgi_task(cycle, cast("ASGI3Application", answer))

    # The end of a connection

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Keeps the connection of a client that has only ended its sending side.

        Returns:
            Whether a complete request is still to be answered.
        """
        if not self.is_answering or self.cycle.more_body:
            return None
        self._is_deaf = True
        self.cycle.keep_alive = False
        self._probe_client(0)
        return True

    def _probe_client(self, count: int) -> None:
        """Finds out whether the client that has ended its sending side has left."""
        running = self._running
        if running is None or running.response_started or not self.transport.send_ahead():
            return
        if count < len(_PROBE_S):
            self._probe = self.loop.call_later(_PROBE_S[count], self._probe_client, count + 1)

    def _finish_input(self) -> None:
        """Serves the request as it is, without a body, and drops what follows."""
        self._is_deaf = True
        self.cycle.keep_alive = False
        self.cycle.more_body = False
        self.cycle.message_event.set()

    def _fail(self, error: ServiceError) -> None:
        """Refuses the request that is being received, and drops what follows."""
        if self._phase is _BODY:
            self.refuse_body(error)
        elif self.is_answering:  # a response now would be taken for the answer to that request
            self._is_deaf = True
            self.cycle.keep_alive = False
        else:
            self._is_deaf = True
            self._guard.count(error)
            path = self.url.decode("latin-1")
            origin = next((value for name, value in self.headers if name == b"origin"), None)
            headers = build_cors_headers(
                self._guard.cors_origins, None if origin is None else origin.decode("latin-1")
            )
            self.transport.write(build_response(error, path, self._settings.retry_after_s, headers))
            self.transport.close()

    def refuse_body(self, error: ServiceError) -> None:
        """Has the application answer with the error, and drops and releases the body."""
        if self._phase is not _BODY or self._is_deaf:
            return
        self._is_deaf = True
        cycle = self.cycle
        if cycle.response_complete:
            self.transport.close()
            return
        self._guard.bodies.complete(self)
        self._guard.bodies.release(self._held[-1])
        self._held[-1] = 0
        cycle.body.clear()
        cycle.keep_alive = False
        cast(dict[str, Any], cycle.scope)["state"][REFUSAL] = error
        cycle.message_event.set()

    def _close(self) -> None:
        """Closes after the client has had time to read the response, if it may still send."""
        transport = self.transport.wrapped
        if self._linger_since_s is not None or transport.is_closing():
            return
        if self._phase is _IDLE or (not self._fed and self._phase is _HEAD):
            transport.close()
            return
        self._is_deaf = True
        self._since_s = self._linger_since_s = time.monotonic()
        self.flow.resume_reading()
        self.transport.write_eof()

    def shutdown(self) -> None:
        """Closes as soon as no request is in work; called by uvicorn."""
        if self.is_answering or self._linger_since_s is not None:
            super().shutdown()
        else:
            self.transport.wrapped.close()

    # Timeouts

    def check(self, now_s: float) -> None:
        """Ends what has taken too long; called several times a second.

        Args:
            now_s: Monotonic time.
        """
        if self._linger_since_s is not None:
            if now_s - self._since_s >= _LINGER_S or now_s - self._linger_since_s >= _MAX_LINGER_S:
                self.transport.abort()
        elif self._response_timer.is_stalled(now_s, self.transport):
            logger.debug("a client did not take its response; the connection is closed")
            self.transport.abort()
        elif self._is_deaf:
            return
        elif self._phase is _BODY:
            paused = self.flow.read_paused
            error = self._body_timer.check(now_s, self._received, is_paused=paused)
            if error is not None:
                self._fail(error)
        elif not self.is_answering:
            self._check_idle(now_s - self._since_s)

    def _check_idle(self, elapsed_s: float) -> None:
        if self._phase is _IDLE:
            if elapsed_s > self._settings.keep_alive_s:
                self.transport.close()
            return
        timeout_s = self._settings.head_timeout_s
        if self._is_excess:
            timeout_s = min(timeout_s, _EXCESS_HEAD_TIMEOUT_S)
        if elapsed_s <= timeout_s:
            return
        if not self._fed:
            self.transport.close()
        elif self._is_excess:
            self._fail(self._guard.build_rejection())
        else:
            text = f"the headers were not complete after {timeout_s:g} s"
            self._fail(HeadTimeout(f"{text}; {self._fed} bytes were here"))
