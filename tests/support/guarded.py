"""A small ASGI application behind `ConnectionGuard`, in the event loop of a test."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from service.http.connections import ConnectionGuard
from service.http.limits import RequestBodies
from service.observe.metrics import Metrics
from service.settings import Settings

LIMITS = {
    "max_connections": 10,
    "retry_after_s": 7,
    "head_timeout_s": 60,
    "body_timeout_s": 60,
    "body_total_s": 60,
    "write_timeout_s": 60,
    "min_rate": 0,
    "keep_alive_s": 60,
}
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
LAST_GET = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"


def build_post(body: bytes, length: int | None = None) -> bytes:
    announced = len(body) if length is None else length
    return POST + b"Content-Length: %d\r\n\r\n" % announced + body


class Echo:
    """Answers with the body after `hold` has been set; counts requests and departures."""

    def __init__(self) -> None:
        self.hold = asyncio.Event()
        self.hold.set()
        self.requests: list[Scope] = []
        self.left = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        self.requests.append(scope)
        body = bytearray()
        more_body = True
        while more_body:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left += 1
                return
            body += message["body"]
            more_body = message["more_body"]
        holding = asyncio.ensure_future(self.hold.wait())
        leaving = asyncio.ensure_future(receive())
        await asyncio.wait({holding, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not holding.done():
            self.left += 1
            return
        leaving.cancel()
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(body)})


class Client:
    """One connection as streams."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        """Sends everything, as far as the server takes it."""
        self.writer.write(data)
        await self.writer.drain()

    async def read_all(self) -> bytes:
        """What comes until the server closes; b"" and a reset are the same."""
        received = bytearray()
        try:
            while data := await asyncio.wait_for(self.reader.read(65_536), 30):
                received += data
        except ConnectionError:
            pass
        return bytes(received)

    async def read_response(self) -> tuple[int, bytes]:
        """Status and body of the next response, which has a Content-Length."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 30)
        (length,) = [
            int(line.split(b":")[1])
            for line in head.lower().split(b"\r\n")
            if line.startswith(b"content-length:")
        ]
        return int(head.split(b" ")[1]), await self.reader.readexactly(length)

    async def end_sending(self) -> None:
        """Closes the sending side alone, and lets the server see it."""
        self.writer.write_eof()
        await asyncio.sleep(0.1)

    def close(self) -> None:
        """Closes the connection."""
        self.writer.close()


class GuardedServer:
    """Listens on a free port.

    Args:
        app: The application.
        max_bytes: Of the bodies.
        limits: Other limits than `LIMITS`.
    """

    def __init__(self, app: ASGIApp, max_bytes: int = 1 << 30, **limits: Any) -> None:
        self.metrics = Metrics()
        self.bodies = RequestBodies(max_bytes)
        self.guard = ConnectionGuard(Settings(**LIMITS | limits), self.bodies, self.metrics)
        self.state = ServerState()
        http = cast(type[asyncio.Protocol], self.guard)
        self._config = uvicorn.Config(app, http=http, ws="none", log_config=None, lifespan="off")
        self._clients: list[Client] = []

    async def __aenter__(self) -> GuardedServer:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: self.guard(self._config, self.state, {}), "127.0.0.1", 0
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for client in self._clients:
            client.close()
        self.guard.abort()
        self._server.close()
        await asyncio.sleep(0.01)

    async def connect(self) -> Client:
        """A new connection, which the server has accepted."""
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        self._clients.append(client)
        await asyncio.sleep(0.01)
        return client

    async def ask(self, data: bytes) -> bytes:
        """All that a new connection is sent for `data` until the server closes it."""
        client = await self.connect()
        await client.send(data)
        return await client.read_all()
