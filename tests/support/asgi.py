"""One request over bare ASGI: the answer can be read while it is sent, and the client can leave."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message

WAIT_S = 10.0


class AsgiExchange:
    """A POST request that an application answers in a task of its own.

    Args:
        app: The application; its lifespan must run.
        path: With the query.
        body: The whole body.
        headers: Of the request.
        peer: The client's address.
    """

    def __init__(
        self,
        app: ASGIApp,
        path: str,
        body: bytes,
        headers: Mapping[str, str] | None = None,
        peer: str = "test",
    ) -> None:
        plain, _, query = path.partition("?")
        names = {"content-type": "image/png", **(headers or {})}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": plain,
            "raw_path": plain.encode(),
            "query_string": query.encode(),
            "headers": [(name.lower().encode(), text.encode()) for name, text in names.items()],
            "scheme": "http",
            "server": ("test", 80),
            "client": (peer, 1),
            "root_path": "",
        }
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})
        self._sent: asyncio.Queue[Message] = asyncio.Queue()
        self.task = asyncio.ensure_future(app(scope, self._incoming.get, self._sent.put))

    def leave(self) -> None:
        """Closes the connection."""
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def next_message(self) -> Message:
        """What the application sends next."""
        return await asyncio.wait_for(self._sent.get(), WAIT_S)

    async def read_status(self) -> tuple[int, dict[str, str]]:
        """Status and headers, which come first."""
        start = await self.next_message()
        assert start["type"] == "http.response.start"
        headers = {name.decode().lower(): text.decode() for name, text in start["headers"]}
        return start["status"], headers

    async def read_chunk(self) -> bytes:
        """The next part of the body; empty at its end."""
        message = await self.next_message()
        assert message["type"] == "http.response.body"
        return bytes(message.get("body", b""))

    async def end(self) -> list[Message]:
        """Waits until the application is done; what it has sent and nobody has read."""
        await asyncio.wait_for(self.task, WAIT_S)
        return [self._sent.get_nowait() for _ in range(self._sent.qsize())]
