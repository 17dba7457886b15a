from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.types import Message

from service.http.exchange import CLIENT_LEFT, WatchedExchange
from tests.support.blob_model import draw_picture, encode_picture
from tests.support.metrics import render

PICTURE = encode_picture(draw_picture())
BODY = {"type": "http.request", "body": b"ab", "more_body": True}
LAST = {"type": "http.request", "body": b"c", "more_body": False}
LEFT = {"type": "http.disconnect"}


class Wire:
    """Gives the messages of a client that leaves after the last one, and keeps the answer."""

    def __init__(self, *messages: dict[str, Any]) -> None:
        self.messages = list(messages)
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        return self.messages.pop(0) if self.messages else LEFT

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    def watch(self) -> WatchedExchange:
        return WatchedExchange(self.receive, self.send, "id-1")


def start(status: int) -> Message:
    return {"type": "http.response.start", "status": status, "headers": []}


def end(*, more_body: bool = False) -> Message:
    return {"type": "http.response.body", "body": b"", "more_body": more_body}


async def test_a_request_that_is_answered() -> None:
    exchange = Wire(LAST).watch()
    await exchange.receive()
    await exchange.send(start(204))
    await exchange.send(end())
    await exchange.receive()  # the client leaves, or asks again
    assert (exchange.status, exchange.client_left, exchange.cut) == (204, False, False)


@pytest.mark.parametrize(("messages", "cut"), [((BODY,), True), ((LAST,), False), ((), True)])
async def test_a_client_that_leaves_before_the_answer(
    messages: tuple[dict[str, Any], ...], cut: bool
) -> None:
    exchange = Wire(*messages).watch()
    while (await exchange.receive())["type"] != "http.disconnect":
        pass
    await exchange.send(start(400))  # what the application says of it
    await exchange.send(end())
    assert (exchange.status, exchange.client_left, exchange.cut) == (CLIENT_LEFT, True, cut)


@pytest.mark.parametrize(("status", "recorded"), [(200, CLIENT_LEFT), (413, 413)])
async def test_a_client_that_leaves_during_the_answer(status: int, recorded: int) -> None:
    """One that has been refused has got what counts."""
    exchange = Wire(LAST).watch()
    await exchange.receive()
    await exchange.send(start(status))
    await exchange.send(end(more_body=True))
    await exchange.receive()
    await exchange.send(end())
    assert exchange.status == recorded


async def test_nothing_sent_is_a_client_that_left() -> None:
    assert Wire().watch().status == CLIENT_LEFT


async def test_the_answer_gets_its_headers() -> None:
    wire = Wire()
    headers = [(b"x-frame-options", b"SAMEORIGIN")]
    await wire.watch().send({"type": "http.response.start", "status": 200, "headers": headers})
    sent = dict(wire.sent[0]["headers"])
    assert sent[b"x-request-id"] == b"id-1"
    assert sent[b"x-frame-options"] == b"SAMEORIGIN"
    assert sent[b"x-content-type-options"] == b"nosniff"


FORM = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\nab'


@pytest.mark.parametrize(
    ("path", "content_type", "sent"),
    [
        ("/segment", "image/png", b"\x89PNG"),
        ("/segment", "image/png", b""),
        ("/segment", "multipart/form-data; boundary=x", FORM),
        ("/v2/models/blobs/infer", "application/json", b'{"inputs"'),
        ("/v2/models/blobs/versions/1/infer", "application/json", b'{"inputs"'),
        ("/v2/repository/index", "application/json", b"{"),
    ],
)
async def test_a_client_that_leaves_in_mid_upload_is_499_and_no_error(
    app: FastAPI, caplog: pytest.LogCaptureFixture, path: str, content_type: str, sent: bytes
) -> None:
    caplog.set_level(logging.DEBUG)
    wire = Wire({**BODY, "body": sent})
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(b"content-type", content_type.encode())],
        "client": ("127.0.0.1", 1),
        "server": ("test", 80),
        "scheme": "http",
        "root_path": "",
    }
    async with app.router.lifespan_context(app):
        caplog.clear()
        await asyncio.wait_for(app(scope, wire.receive, wire.send), 20)
        text = render(app.state.metrics)
    assert re.search(r'solo_requests_total\{method="POST",route="[^"]+",status="499"\} 1\.0', text)
    assert 'status="5' not in text and 'status="400"' not in text
    records = [record for record in caplog.records if record.name.startswith("service")]
    assert records and all(record.levelno == logging.DEBUG for record in records)
    assert not any(record.exc_info for record in caplog.records)
    assert app.state.segmenter.admission.requests == 0
