from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from service.metrics import Metrics
from service.middleware import BodyLimitMiddleware

LIMIT = 100


class Exchange:
    """One request over bare ASGI: what was sent, and how much of the body was asked for."""

    def __init__(self, chunks: list[bytes], headers: dict[bytes, bytes] | None = None) -> None:
        self.scope: Scope = {"type": "http", "path": "/", "headers": list((headers or {}).items())}
        self.waiting = [
            {"type": "http.request", "body": chunk, "more_body": i + 1 < len(chunks)}
            for i, chunk in enumerate(chunks)
        ]
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        return self.waiting.pop(0) if self.waiting else {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])


async def read_body(receive: Receive) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return


async def echo_length(scope: Scope, receive: Receive, send: Send) -> None:
    length = sum([len(chunk) async for chunk in read_body(receive)])
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(length).encode()})


async def run(exchange: Exchange) -> Metrics:
    metrics = Metrics()
    middleware = BodyLimitMiddleware(echo_length, LIMIT, metrics)
    await middleware(exchange.scope, exchange.receive, exchange.send)
    return metrics


@pytest.mark.parametrize("chunks", [[b""], [b"x" * 100], [b"x" * 60, b"x" * 40]])
async def test_a_body_within_the_limit_passes(chunks: list[bytes]) -> None:
    exchange = Exchange(chunks)
    await run(exchange)
    assert exchange.status == 200
    assert exchange.sent[1]["body"] == str(sum(map(len, chunks))).encode()


async def test_an_announced_length_over_the_limit_is_refused_before_reading() -> None:
    exchange = Exchange([b"x" * 101], {b"content-length": b"101"})
    metrics = await run(exchange)
    assert exchange.status == 413
    assert b"101 bytes, the limit is 100" in exchange.sent[1]["body"]
    assert b'reason="body_too_large"} 1.0' in metrics.render()


@pytest.mark.parametrize("announced", [{}, {b"content-length": b"5"}, {b"content-length": b"-1"}])
async def test_a_body_that_grows_over_the_limit_is_cut(announced: dict[bytes, bytes]) -> None:
    exchange = Exchange([b"x" * 60] * 50, announced)
    await run(exchange)
    assert exchange.status == 413
    assert exchange.sent[1]["more_body"] is True
    assert exchange.sent[-1]["more_body"] is False
    assert (b"connection", b"close") in exchange.sent[0]["headers"]


async def test_a_client_that_never_ends_is_left_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(BodyLimitMiddleware, "linger_s", 0.01)

    class Endless(Exchange):
        async def receive(self) -> Message:
            await asyncio.sleep(0)
            return {"type": "http.request", "body": b"x" * 60, "more_body": True}

    exchange = Endless([])
    await run(exchange)
    assert exchange.status == 413
    assert exchange.sent[-1]["more_body"] is False


async def test_other_protocols_pass_untouched() -> None:
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    exchange = Exchange([])
    await BodyLimitMiddleware(app, LIMIT, Metrics())(
        {"type": "lifespan"}, exchange.receive, exchange.send
    )
    assert seen == [{"type": "lifespan"}]
