"""gRPC status codes of the service's errors."""

from __future__ import annotations

from grpc import StatusCode

MAX_TEXT = 1000
"""Characters of an error's text: clients refuse headers of more than 8 KiB."""
_BY_CODE = {
    "body_too_large": StatusCode.RESOURCE_EXHAUSTED,
    "body_timeout": StatusCode.DEADLINE_EXCEEDED,
}
_BY_HTTP_STATUS = {
    401: StatusCode.UNAUTHENTICATED,
    403: StatusCode.PERMISSION_DENIED,
    404: StatusCode.NOT_FOUND,
    429: StatusCode.RESOURCE_EXHAUSTED,
    499: StatusCode.CANCELLED,
    500: StatusCode.INTERNAL,
    501: StatusCode.UNIMPLEMENTED,
    503: StatusCode.UNAVAILABLE,
    504: StatusCode.DEADLINE_EXCEEDED,
}


def find_status(http_status: int, code: str) -> StatusCode:
    """The status of an error.

    Args:
        http_status: What HTTP answers it with.
        code: Of `service.errors`.
    """
    other = StatusCode.INTERNAL if http_status >= 500 else StatusCode.INVALID_ARGUMENT
    return _BY_CODE.get(code) or _BY_HTTP_STATUS.get(http_status, other)


def shorten(text: str) -> str:
    """An error's text as it is sent."""
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 3]}..."
