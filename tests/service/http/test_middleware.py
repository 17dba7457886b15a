from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from service.http.app import create_app
from service.http.middleware import BodyLimitMiddleware, RequestContextMiddleware
from service.models.repository import load_repository
from service.observe.metrics import Metrics
from service.settings import Settings
from tests.service.conftest import OPTIONS, OpenClient
from tests.support.metrics import render

LIMIT = 100
TIMEOUT_S = 30.0


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


class Silent(Exchange):
    """A client that stays, and sends nothing more."""

    async def receive(self) -> Message:
        if not self.waiting:
            await asyncio.Event().wait()
        return await super().receive()


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
    middleware = BodyLimitMiddleware(echo_length, LIMIT, TIMEOUT_S, metrics)
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
    assert 'reason="body_too_large"} 1.0' in render(metrics)


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


async def test_a_body_that_stops_coming_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BodyLimitMiddleware, "linger_s", 0.01)

    exchange = Silent([b"x" * 60, b""])
    exchange.waiting.pop()
    metrics = Metrics()
    middleware = BodyLimitMiddleware(echo_length, LIMIT, 0.01, metrics)
    await middleware(exchange.scope, exchange.receive, exchange.send)
    assert exchange.status == 408
    assert (
        b"nothing more of the body came in 0.01 s; 60 bytes were here" in exchange.sent[1]["body"]
    )
    assert 'reason="body_timeout"} 1.0' in render(metrics)


async def test_a_whole_body_may_be_followed_by_any_silence() -> None:
    """What is received after it is the client's leaving."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    exchange = Silent([b"x"])
    middleware = BodyLimitMiddleware(app, LIMIT, 0.01, Metrics())
    await middleware(exchange.scope, exchange.receive, exchange.send)
    assert exchange.status == 200


async def test_other_protocols_pass_untouched() -> None:
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    exchange = Exchange([])
    await BodyLimitMiddleware(app, LIMIT, TIMEOUT_S, Metrics())(
        {"type": "lifespan"}, exchange.receive, exchange.send
    )
    assert seen == [{"type": "lifespan"}]


async def test_every_answer_has_the_security_headers(client: httpx.AsyncClient) -> None:
    for path in ("/v2/models", "/nowhere", "/metrics"):
        headers = (await client.get(path)).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"


async def test_other_origins_may_ask_only_if_they_are_named(
    settings: Settings, open_client: OpenClient
) -> None:
    for origins, allowed in (("", None), ("https://a.test, https://b.test", "https://b.test")):
        changed = settings.model_copy(update={"cors_origins": origins})
        app = create_app(changed, load_repository(changed.model_repo, OPTIONS))
        async with open_client(app) as client:
            for origin, expected in (("https://b.test", allowed), ("https://c.test", None)):
                response = await client.get("/v2/models", headers={"Origin": origin})
                assert response.headers.get("access-control-allow-origin") == expected


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/segment", 415),
        ("/v2/models/blobs/infer", 400),
        ("/v2/models/blobs/versions/1/infer", 400),
    ],
)
async def test_a_request_is_one_log_line_with_its_id(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, path: str, status: int
) -> None:
    caplog.set_level("INFO", "service.http.middleware")
    await client.get("/metrics")  # at level debug
    await client.post(path, content=b"x", headers={"X-Request-Id": "abc-1"})
    (record,) = [r for r in caplog.records if r.name == "service.http.middleware"]
    fields = {name: vars(record)[name] for name in ("request_id", "method", "path", "status")}
    assert fields == {"request_id": "abc-1", "method": "POST", "path": path, "status": status}
    assert "trace_id" not in vars(record)


async def test_a_refusal_speaks_the_protocol_of_its_path() -> None:
    for path, expected in (("/segment", {"code", "message"}), ("/v2/models/a/infer", None)):
        exchange = Exchange([], {b"content-length": b"101"})
        exchange.scope["path"] = path
        await run(exchange)
        error = json.loads(exchange.sent[1]["body"])["error"]
        assert isinstance(error, str) if expected is None else set(error) == expected


async def test_the_duration_of_a_request_is_recorded_as_it_was(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the histogram in seconds, in the log in milliseconds; from first byte to last."""
    caplog.set_level("DEBUG", "service.http.middleware")

    async def take_time(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.1)
        await echo_length(scope, receive, send)
        await asyncio.sleep(0.1)

    metrics = Metrics()
    exchange = Exchange([b"abc"])
    exchange.scope.update(path="/segment", method="POST")
    middleware = RequestContextMiddleware(take_time, metrics, ("/segment",))
    began_s = time.monotonic()
    await middleware(exchange.scope, exchange.receive, exchange.send)
    most_s = time.monotonic() - began_s
    text = render(metrics)
    labels = '{method="POST",route="/segment"}'
    (recorded,) = re.findall(f"^solo_request_duration_seconds_sum{labels} (.*)$", text, re.M)
    assert 0.19 < float(recorded) <= most_s
    assert f"solo_request_duration_seconds_count{labels} 1.0" in text
    (record,) = [r for r in caplog.records if r.name == "service.http.middleware"]
    assert vars(record)["duration_ms"] == pytest.approx(1e3 * float(recorded), abs=0.06)
    assert f"{vars(record)['duration_ms']:.1f} ms" in record.getMessage()


async def test_a_request_that_fails_has_a_duration_too() -> None:
    async def explode(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.05)
        raise RuntimeError

    metrics = Metrics()
    exchange = Exchange([b""])
    exchange.scope.update(path="/segment", method="POST")
    middleware = RequestContextMiddleware(explode, metrics, ("/segment",))
    await middleware(exchange.scope, exchange.receive, exchange.send)
    assert exchange.status == 500
    text = render(metrics)
    labels = '{method="POST",route="/segment"}'
    (recorded,) = re.findall(f"^solo_request_duration_seconds_sum{labels} (.*)$", text, re.M)
    assert float(recorded) > 0.045
    assert 'solo_requests_total{method="POST",route="/segment",status="500"} 1.0' in text


async def test_the_time_of_an_upload_is_part_of_the_duration() -> None:
    class Slow(Exchange):
        async def receive(self) -> Message:
            await asyncio.sleep(0.05)
            return await super().receive()

    metrics = Metrics()
    exchange = Slow([b"a", b"b", b"c"])
    exchange.scope.update(path="/segment", method="POST")
    middleware = RequestContextMiddleware(echo_length, metrics, ("/segment",))
    await middleware(exchange.scope, exchange.receive, exchange.send)
    (recorded,) = re.findall(
        r'^solo_request_duration_seconds_sum{method="POST",route="/segment"} (.*)$',
        render(metrics),
        re.M,
    )
    assert float(recorded) > 0.14


async def test_an_answer_that_has_begun_is_not_begun_again() -> None:
    """The body grows over its limit while the application already answers."""

    async def answer_at_once(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        async for _ in read_body(receive):
            pass

    exchange = Exchange([b"x" * 60] * 5)
    middleware = BodyLimitMiddleware(answer_at_once, LIMIT, TIMEOUT_S, Metrics())
    await middleware(exchange.scope, exchange.receive, exchange.send)
    assert [message["type"] for message in exchange.sent] == ["http.response.start"]
    assert exchange.status == 200


async def test_an_answer_that_has_begun_is_not_followed_by_an_error() -> None:
    async def break_off(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError

    metrics = Metrics()
    exchange = Exchange([b""])
    exchange.scope.update(path="/segment", method="POST")
    middleware = RequestContextMiddleware(break_off, metrics, ("/segment",))
    await middleware(exchange.scope, exchange.receive, exchange.send)
    assert [message["type"] for message in exchange.sent] == ["http.response.start"]
