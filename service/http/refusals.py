"""Refusals of requests that do not reach the application, or not as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus

from service.errors import (
    Draining,
    EngineRestarting,
    Overloaded,
    QuotaExceeded,
    ServiceError,
    Unauthorized,
    build_error_body,
    describe_error,
)
from service.observe.metrics import Metrics

REFUSAL = "refusal"
"""Key of a request's ASGI state: the `ServiceError` of a body that the guard has refused."""


def get_reason(error: ServiceError) -> str:
    """The label of `solo_rejections_total` for an error."""
    return error.reason if isinstance(error, Overloaded) else error.code


def count_refusal(error: Exception, metrics: Metrics, retry_after_s: int) -> int | None:
    """Counts an error if it refuses a request that may be sent again.

    Args:
        error: Whose answer is to be sent.
        metrics: Where rejections are counted.
        retry_after_s: Retry-After of a 503, seconds.

    Returns:
        When the request may be sent again, seconds; None if that does not help.
    """
    if isinstance(error, (Overloaded, Draining, EngineRestarting)):
        metrics.rejections.labels(get_reason(error)).inc()
        return retry_after_s
    if isinstance(error, QuotaExceeded):
        metrics.rejections.labels(error.reason).inc()
        return error.retry_after_s
    if isinstance(error, Unauthorized):
        metrics.rejections.labels(get_reason(error)).inc()
    return None


def build_response(
    error: ServiceError, path: str, retry_after_s: int, headers: Sequence[tuple[str, str]] = ()
) -> bytes:
    """A complete HTTP/1.1 response with an error, after which the connection closes.

    Args:
        error: Why the request is refused.
        path: The request's; may be empty.
        retry_after_s: Retry-After of a 503, seconds.
        headers: Sent too.
    """
    status, detail = describe_error(error)
    body = build_error_body(detail, path)
    head = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        *([f"retry-after: {retry_after_s}"] if status == HTTPStatus.SERVICE_UNAVAILABLE else []),
        "x-content-type-options: nosniff",
        "connection: close",
        *(f"{name}: {value}" for name, value in headers),
    ]
    return "\r\n".join([*head, "", ""]).encode() + body
