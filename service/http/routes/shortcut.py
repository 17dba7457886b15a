"""POST /segment without the framework's routing and validation.

What that saves is in docs/performance.md. The route of `service.http.routes.segment` documents what
is taken and does what this does; a test sends the same requests to both.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from pipeline.errors import DecodeError
from service.errors import ServiceError
from service.http.routes.segment import PATH, segment
from service.http.routes.state import find_quota, get_segmenter
from service.http.schemas import SegmentQuery, TimeoutMs

ErrorAnswer = Callable[[Request, Exception], Awaitable[Response]]
HANDLED = (ServiceError, DecodeError, RequestValidationError, HTTPException)
"""Errors that have an answer of their own, here and behind the framework's routing."""

_TIMEOUT_HEADER = "x-timeout-ms"
_NO_QUERY = SegmentQuery()
_TIMEOUT: TypeAdapter[int | None] = TypeAdapter(TimeoutMs)


class Shortcut:
    """ASGI middleware that answers POST /segment itself and passes on all else.

    Args:
        app: What it wraps.
        answer: To the errors of `HANDLED`.
    """

    def __init__(self, app: ASGIApp, answer: ErrorAnswer) -> None:
        self.app = app
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection."""
        if scope["type"] != "http" or scope["path"] != PATH or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive, send)
        try:
            quota = await find_quota(request)
            query, timeout_ms = read_parameters(request)
            response = await segment(
                request, query, await get_segmenter(request), quota, timeout_ms
            )
        except HANDLED as error:
            response = await self._answer(request, error)
        await response(scope, receive, send)


def read_parameters(request: Request) -> tuple[SegmentQuery, int | None]:
    """The query and the header X-Timeout-Ms, as FastAPI reads them.

    Raises:
        RequestValidationError: Names all that is wrong, as FastAPI does.
    """
    query, timeout_ms = _NO_QUERY, None
    wrong: list[dict[str, Any]] = []
    if request.scope["query_string"]:
        values = dict(QueryParams(request.scope["query_string"]))
        try:
            query = SegmentQuery.model_validate(values)
        except ValidationError as error:
            wrong += _locate(error, "query")
    header = request.headers.get(_TIMEOUT_HEADER)
    if header is not None:
        try:
            timeout_ms = _TIMEOUT.validate_python(header)
        except ValidationError as error:
            wrong += _locate(error, "header", _TIMEOUT_HEADER)
    if wrong:
        raise RequestValidationError(wrong)
    return query, timeout_ms


def _locate(error: ValidationError, *place: str) -> list[dict[str, Any]]:
    return [{**item, "loc": (*place, *item["loc"])} for item in error.errors()]
