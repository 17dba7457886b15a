"""Pure ASGI middleware: request ids, counting, and the limit on bodies.

Not BaseHTTPMiddleware: behind that a handler never learns that its client has left.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Collection, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import (
    BodyTooLarge,
    Draining,
    Overloaded,
    ServiceError,
    build_error_body,
    describe_error,
)
from service.http.exchange import REQUEST_ID, WatchedExchange
from service.http.refusals import REFUSAL, get_reason
from service.observe.metrics import Metrics
from service.observe.requests import AnsweredRequest, record
from service.observe.timing import Interval
from service.observe.tracing import TracedImage, Tracer, collect_images

logger = logging.getLogger(__name__)

_SANE_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


def choose_id(wanted: str) -> str:
    """The id of a request: the client's if it is short and harmless, else a random one."""
    return wanted if _SANE_ID.fullmatch(wanted) else os.urandom(16).hex()


class RequestContextMiddleware:
    """Gives the request its id, counts it, logs one line, answers what nobody caught.

    Outermost but for CORS. HEAD is routed as GET.

    Args:
        app: What it wraps.
        metrics: Where requests are counted.
        routes: Paths that may become labels; all others but route templates are "unmatched".
        tracer: Makes spans of the requests for segmentation.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        routes: Collection[str],
        tracer: Tracer | None = None,
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.routes = frozenset(routes)
        self.tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = choose_id(Headers(scope=scope).get(REQUEST_ID, ""))
        images = collect_images() if self.tracer is not None else []
        began_s = time.monotonic()
        scope.setdefault("state", {}).update(request_id=request_id, began_s=began_s)
        exchange = WatchedExchange(receive, send, request_id)
        # The server sends no body in answer to HEAD, so every route of GET can answer it.
        routed = {**scope, "method": "GET"} if scope.get("method") == "HEAD" else scope
        try:
            await self.app(routed, exchange.receive, exchange.send)
        except Exception as error:
            extra = {"request_id": request_id}
            if exchange.client_left:
                logger.debug("the client of request %s has left", request_id, extra=extra)
            else:
                logger.exception("request %s failed", request_id, extra=extra)
                if not exchange.started:
                    await send_error(exchange.send, error, scope["path"])
        finally:
            ran = (began_s, time.monotonic())
            self._count(scope, routed.get("route"), request_id, exchange, ran, images)

    def _count(
        self,
        scope: Scope,
        matched: Any,
        request_id: str,
        exchange: WatchedExchange,
        ran: Interval,
        images: Sequence[TracedImage],
    ) -> None:
        fallback = scope["path"] if scope["path"] in self.routes else "unmatched"
        route = getattr(matched, "path", fallback)
        request = AnsweredRequest(
            route=route,
            method=scope["method"] if route != "unmatched" else "any",
            path=scope["path"],
            request_id=request_id,
            status=exchange.status,
            ran=ran,
            headers={} if self.tracer is None else dict(Headers(scope=scope)),
            attributes={"url.scheme": scope.get("scheme", "http")},
            images=images,
            is_cut=exchange.cut,
        )
        record(request, self.metrics, self.tracer, logger)


async def send_error(
    send: Send, error: Exception, path: str, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """Sends an error's response, for where there is no framework around.

    Args:
        send: ASGI's.
        error: Whose response.
        path: The request's.
        headers: Sent too.
    """
    status, detail = describe_error(error)
    body = build_error_body(detail, path)
    own = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})


class BodyLimitMiddleware:
    """Counts a body's bytes before anything parses them; answers bodies that are refused.

    A body that announces its length is refused before it is read, a chunked one as soon as it
    has passed the limit. `service.http.guard` refuses the others: slow ones, and those for which
    there is no memory. It also closes the connection after an answer to an incomplete body.

    Args:
        app: What it wraps.
        max_bytes: The limit.
        retry_after_s: Retry-After of a 503, seconds.
        metrics: Where rejections are counted.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, retry_after_s: int, metrics: Metrics) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.retry_after_s = retry_after_s
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > self.max_bytes:
            refused = self._too_large(f"the body has {announced} bytes")
            await self._refuse(refused.error, scope, send)
            return
        received = 0
        more_body = True
        started = False

        async def watched_receive() -> Message:
            nonlocal received, more_body
            message = await receive()
            if not more_body:
                return message
            refusal = scope.get("state", {}).get(REFUSAL)
            if refusal is not None:
                raise _Refused(refusal)
            received += len(message.get("body", b""))
            more_body = message.get("more_body", False)
            if received > self.max_bytes:
                raise self._too_large(f"the body has at least {received} bytes")
            return message

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, watched_receive, watched_send)
        except _Refused as refused:
            if not started:
                await self._refuse(refused.error, scope, send)

    def _too_large(self, found: str) -> _Refused:
        return _Refused(BodyTooLarge(f"{found}, the limit is {self.max_bytes}"))

    async def _refuse(self, error: ServiceError, scope: Scope, send: Send) -> None:
        self.metrics.rejections.labels(get_reason(error)).inc()
        is_passing = isinstance(error, (Overloaded, Draining))
        headers = [(b"retry-after", b"%d" % self.retry_after_s)] if is_passing else []
        await send_error(send, error, scope["path"], headers)


class _Refused(BaseException):
    """Leaves the application without being taken for an error of its own."""

    def __init__(self, error: ServiceError) -> None:
        super().__init__(str(error))
        self.error = error
