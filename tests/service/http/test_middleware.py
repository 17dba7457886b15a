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

from service.errors import BodyTimeout, Draining, InvalidRequest, Overloaded, ServiceError
from service.http.app import create_app
from service.http.middleware import BodyLimitMiddleware, RequestContextMiddleware
from service.http.refusals import REFUSAL
from service.models.repository import load_repository
from service.observe.metrics import Metrics
from service.settings import Settings
from tests.service.conftest import OPTIONS, OpenClient
from tests.support.metrics import render

LIMIT = 100
RETRY_AFTER_S = 7


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
    middleware = BodyLimitMiddleware(echo_length, LIMIT, RETRY_AFTER_S, metrics)
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
    assert len(exchange.sent) == 2
    assert len(exchange.waiting) == 48


@pytest.mark.parametrize(
    ("error", "status", "reason", "retry_after"),
    [
        (BodyTimeout("slow"), 408, "body_timeout", None),
        (InvalidRequest("framing"), 400, "invalid_request", None),
        (Overloaded("full", "body_bytes"), 503, "body_bytes", b"7"),
        (Draining("going down"), 503, "draining", b"7"),
    ],
)
async def test_a_body_that_the_guard_refuses_is_answered_with_its_error(
    error: ServiceError, status: int, reason: str, retry_after: bytes | None
) -> None:
    exchange = Exchange([b"x" * 60, b"", b""])
    exchange.scope["state"] = state = {}

    async def receive() -> Message:
        if len(exchange.waiting) == 2:
            state[REFUSAL] = error
        return await exchange.receive()

    metrics = Metrics()
    middleware = BodyLimitMiddleware(echo_length, LIMIT, RETRY_AFTER_S, metrics)
    await middleware(exchange.scope, receive, exchange.send)
    assert exchange.status == status
    assert str(error).encode() in exchange.sent[1]["body"]
    headers = dict(exchange.sent[0]["headers"])
    assert headers.get(b"retry-after") == retry_after
    assert f'reason="{reason}"}} 1.0' in render(metrics)


async def test_a_refusal_after_the_body_is_complete_changes_nothing() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        scope["state"][REFUSAL] = BodyTimeout("late")
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    exchange = Exchange([b"x"])
    exchange.scope["state"] = {}
    middleware = BodyLimitMiddleware(app, LIMIT, RETRY_AFTER_S, Metrics())
    await middleware(exchange.scope, exchange.receive, exchange.send)
    assert exchange.status == 200


async def test_other_protocols_pass_untouched() -> None:
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    exchange = Exchange([])
    await BodyLimitMiddleware(app, LIMIT, RETRY_AFTER_S, Metrics())(
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
    middleware = BodyLimitMiddleware(answer_at_once, LIMIT, RETRY_AFTER_S, Metrics())
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
