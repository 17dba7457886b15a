"""What can go wrong.

    SoloError
    ├── ConnectionFailed      no connection, or it broke
    ├── TimedOut              no answer in time
    ├── ServerError           an answer that is an error: `status`, `code`, `message`, `request_id`
    │   ├── RequestRefused    4xx: asking again gives the same
    │   ├── Busy              429 or 503, `retry_after_s`
    │   └── ServerFailed      any other status
    ├── ImageFailed           the server cannot segment an image: `index`, `code`, `message`
    └── UnexpectedAnswer      not an answer of solo-serve

A file that cannot be read is an OSError, a wrong argument a TypeError or ValueError.
"""

from __future__ import annotations


class SoloError(Exception):
    """Base of the client's errors."""


class ConnectionFailed(SoloError):
    """There is no connection, or it broke before the answer was complete."""


class TimedOut(SoloError):
    """The server did not answer in time."""


class ServerError(SoloError):
    """The server answered with an error.

    Attributes:
        status: The HTTP status.
        code: The server's name of the error, e.g. "unsupported_format"; "" if it gave none.
        message: Its text.
        request_id: Finds the request in the server's log; None if it gave none.
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
    """Something is wrong with the request (4xx)."""


class Busy(ServerError):
    """The server takes no more work now (429, 503).

    Attributes:
        retry_after_s: When it wants to be asked again; None if it did not say.
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
    """The server failed (any status but 2xx, 4xx and 503)."""


class ImageFailed(SoloError):
    """The server cannot segment an image, e.g. because it is damaged.

    Attributes:
        index: Its place in the request.
        file_name: As it was sent; None if it has none.
        code: The server's name of the error, e.g. "corrupt_image".
        message: Its text.
    """

    def __init__(self, index: int, file_name: str | None, code: str, message: str) -> None:
        super().__init__(f"image {index}: {code}: {message}")
        self.index = index
        self.file_name = file_name
        self.code = code
        self.message = message


class UnexpectedAnswer(SoloError):
    """The answer is not one of solo-serve."""
