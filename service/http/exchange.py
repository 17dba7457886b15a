"""The messages of one request, watched on their way between server and application."""

from __future__ import annotations

from starlette.types import Message, Receive, Send

REQUEST_ID = "x-request-id"
_SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
)
"""Of every response that does not set its own."""
CLIENT_LEFT = 499
"""Status in log and metrics of a request whose client left before the answer."""


class WatchedExchange:
    """Passes on the messages of one request, and notes how far it got.

    Args:
        receive: ASGI's.
        send: ASGI's.
        request_id: Added to the answer, with the security headers.

    Attributes:
        started: Whether an answer was begun.
        client_left: Whether the client left before the answer's end, if it was no refusal.
        cut: Whether it left before the end of the request's body.
    """

    def __init__(self, receive: Receive, send: Send, request_id: str) -> None:
        self.started = False
        self.client_left = False
        self.cut = False
        self._receive = receive
        self._send = send
        self._request_id = request_id
        self._status = CLIENT_LEFT
        self._received = False
        self._ended = False

    @property
    def status(self) -> int:
        """The answer's, or `CLIENT_LEFT`."""
        return CLIENT_LEFT if self.client_left else self._status

    @property
    def _is_refused(self) -> bool:
        return self.started and self._status >= 400

    async def receive(self) -> Message:
        """The next message of the client."""
        message = await self._receive()
        if message["type"] == "http.request":
            self._received = not message.get("more_body", False)
        elif not self._ended and not self._is_refused:
            self.client_left = True
            self.cut = not self._received
        return message

    async def send(self, message: Message) -> None:
        """Sends a message of the application."""
        if message["type"] == "http.response.start":
            self.started = True
            self._status = message["status"]
            headers = message["headers"]
            names = {name for name, _ in headers}
            message["headers"] = [
                *headers,
                (REQUEST_ID.encode(), self._request_id.encode()),
                *(header for header in _SECURITY_HEADERS if header[0] not in names),
            ]
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._ended = True
