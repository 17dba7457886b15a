"""Errors of the client.

    SoloError
    ├── ConnectionFailed      no connection, or it broke
    ├── TimedOut              the server sent nothing for `timeout_s`
    ├── ServerError           the server answered with an error: `status`, `code`, `message`
    │   ├── RequestRefused    4xx: a retry gives the same error
    │   ├── Busy              429 or 503, `retry_after_s`
    │   └── ServerFailed      any other status
    ├── ImageFailed           the server cannot segment an image: `index`, `code`, `message`
    └── UnexpectedAnswer      not an answer of solo-serve

A file that cannot be read raises OSError, a wrong argument TypeError or ValueError.
"""

from __future__ import annotations


class SoloError(Exception):
    """Base of the client's errors."""


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
    """The server accepts no work at the moment (429, 503).

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
    """The server failed (any status except 2xx, 4xx and 503)."""


class ImageFailed(SoloError):
    """The server cannot segment an image, e.g. because it is damaged.

    Attributes:
        index: Position of the image in the request, from 0.
        file_name: File name of the path that was sent; None for any other input.
        code: Name of the error, e.g. "corrupt_image".
        message: Text of the error.
    """

    def __init__(self, index: int, file_name: str | None, code: str, message: str) -> None:
        super().__init__(f"image {index}: {code}: {message}")
        self.index = index
        self.file_name = file_name
        self.code = code
        self.message = message


class UnexpectedAnswer(SoloError):
    """The answer is not one of solo-serve."""
