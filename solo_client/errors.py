"""Errors of the client.

    SoloError
    ├── ConnectionFailed      no connection, or it broke
    ├── TimedOut              the server sent nothing for `timeout_s`
    ├── ServerError           the server answered with an error: `status`, `code`, `message`
    │   ├── RequestRefused    4xx: a retry gives the same error
    │   ├── Busy              429 or 503, or a proxy's 502 or 504: `retry_after_s`
    │   └── ServerFailed      any other status
    ├── ImageFailed           the server cannot segment an image: `index`, `code`, `message`
    └── UnexpectedAnswer      not an answer of solo-serve

A file that cannot be read raises OSError, a wrong argument TypeError or ValueError, and a closed
client RuntimeError. SoloErrors can be copied and pickled.
"""

from __future__ import annotations

import copyreg
from typing import Any


class SoloError(Exception):
    """Base of the client's errors."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Restores the fields without the constructor, whose arguments are not `args`."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class ConnectionFailed(SoloError):
    """There is no connection, or it ended before the answer was complete."""


class TimedOut(SoloError):
    """The server sent nothing for `timeout_s`."""


class ServerError(SoloError):
    """The server answered with an error.

    Attributes:
        status: HTTP status.
        code: Name of the error, e.g. "unsupported_format"; "" if the server sent none.
        message: Text of the error.
        request_id: Id of the request in the server's log; None if the server sent none.
    """

    def __init__(
        self, status: int, code: str, message: str, *, request_id: str | None = None
    ) -> None:
        super().__init__(f"{code or f'HTTP status {status}'}: {message}")
        self.status = status
        self.code = code
        self.message = message
        self.request_id = request_id


class RequestRefused(ServerError):
    """The request is invalid or not allowed (4xx)."""


class Busy(ServerError):
    """The server accepts no work at the moment (429, 503), or a proxy cannot reach it (502, 504).

    Attributes:
        retry_after_s: Time to wait before a retry; None if the server sent none.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(status, code, message, request_id=request_id)
        self.retry_after_s = retry_after_s


class ServerFailed(ServerError):
    """The server failed (any status except 2xx, 4xx and those of `Busy`)."""


class ImageFailed(SoloError):
    """The server cannot segment an image, e.g. because it is damaged.

    Attributes:
        index: Position of the image in the request, from 0.
        file_name: File name of the path or open file that was sent; None for any other input.
        code: Name of the error, e.g. "corrupt_image".
        message: Text of the error.
    """

    def __init__(self, index: int, file_name: str | None, code: str, message: str) -> None:
        name = "" if file_name is None else f" ({file_name})"
        super().__init__(f"image {index}{name}: {code}: {message}")
        self.index = index
        self.file_name = file_name
        self.code = code
        self.message = message


class UnexpectedAnswer(SoloError):
    """The answer is not one of solo-serve."""
