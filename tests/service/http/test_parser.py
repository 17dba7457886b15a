"""What the parser makes of malformed heads and chunks, and of upgrades."""

from __future__ import annotations

import asyncio

import pytest

from service.http.guard import MAX_HEADERS
from service.http.refusals import REFUSAL
from tests.support.guarded import CHUNKED, GET, LAST_GET, POST, Echo, GuardedServer
from tests.support.metrics import render
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("quick_connections")


@pytest.mark.parametrize(
    "head",
    [
        GET.replace(b"Host: a\r\n", b""),
        GET.replace(b"Host: a", b"Host: a\r\nHost: a"),
        GET.replace(b"1.1", b"2.0"),
        b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET http://a HTTP/1.1\r\nHost: a\r\n\r\n",
        POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        POST + b"X: a\r\n b\r\n\r\n",
        GET.replace(b"\r\n", b"\n"),
        b"\x16\x03\x01\x02\x00",
    ],
)
async def test_a_malformed_head_is_answered_400_and_not_served(head: bytes) -> None:
    echo = Echo()
    async with GuardedServer(echo) as server:
        answer = await server.ask(head + GET)
        assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert b'"code":"invalid_request"' in answer
        assert answer.count(b"HTTP/1.1 ") == 1
        assert echo.requests == []
        assert 'reason="invalid_request"} 1.0' in render(server.metrics)


FRAMING = "bytes frame a body of"


@pytest.mark.parametrize(
    ("start", "text"),
    [
        (b"1;" + b"a" * 200_000, FRAMING),
        (b"1" + b";a=b" * 50_000, FRAMING),
        (b"1\r\na\r\n" * 40_000, FRAMING),
        (b"0\r\nX: " + b"a" * 200_000, FRAMING),
        (b"0\r\n" + b"X: a\r\n" * (MAX_HEADERS + 2), "more than 200 headers"),
    ],
    ids=["extension", "extensions", "one byte each", "trailer", "trailers"],
)
async def test_the_framing_of_a_chunked_body_is_bounded(start: bytes, text: str) -> None:
    echo = Echo()
    async with GuardedServer(echo) as server:
        client = await server.connect()
        await client.send(CHUNKED)
        await wait_until(lambda: bool(echo.requests))
        await client.send(start)
        await wait_until(lambda: REFUSAL in echo.requests[0]["state"])
        assert text in str(echo.requests[0]["state"][REFUSAL])


async def test_trailers_do_not_become_headers() -> None:
    echo = Echo()
    async with GuardedServer(echo) as server:
        await server.ask(CHUNKED + b"1\r\na\r\n0\r\nX-Key: secret\r\n\r\n")
    assert b"x-key" not in dict(echo.requests[0]["headers"])


@pytest.mark.parametrize("bad", [b"x\r\n", b"-1\r\n", b"0x1\r\na\r\n", b"1\r\nab\r\n", b"f" * 17])
async def test_a_malformed_chunk_is_refused(bad: bytes) -> None:
    echo = Echo()
    async with GuardedServer(echo) as server:
        client = await server.connect()
        await client.send(CHUNKED + bad)
        await wait_until(lambda: bool(echo.requests) and REFUSAL in echo.requests[0]["state"])
        assert "not valid HTTP/1.1" in str(echo.requests[0]["state"][REFUSAL])


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket", b"x, y"])
@pytest.mark.parametrize("framing", [b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n"])
@pytest.mark.parametrize("piece", [1000, 7])
async def test_an_upgrade_is_ignored(protocol: bytes, framing: bytes, piece: int) -> None:
    body = b"3\r\nabc\r\n0\r\n\r\n" if b"chunked" in framing else b"abc"
    request = POST + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: " + protocol + b"\r\n"
    request += b"HTTP2-Settings: a\r\nX-A: b\r\n" + framing + b"\r\n" + body
    echo = Echo()
    async with GuardedServer(echo) as server:
        client = await server.connect()
        data = request + request + LAST_GET
        for start in range(0, len(data), piece):
            await client.send(data[start : start + piece])
            await asyncio.sleep(0)
        assert [await client.read_response() for _ in range(3)] == [(200, b"abc")] * 2 + [
            (200, b"")
        ]
        assert await client.read_all() == b""
    assert [scope["method"] for scope in echo.requests] == ["POST", "POST", "GET"]
    assert (b"x-a", b"b") in echo.requests[0]["headers"]


@pytest.mark.parametrize(
    ("lines", "status", "text"),
    [
        (b"Host: a b\r\n", b"400", b"Host 'a b' is not valid"),
        (b"Host: a\r\nHost: a\r\n", b"400", b"2 Host headers"),
        (b"Host: a\r\n" + b"X: a\r\n" * MAX_HEADERS, b"431", b"more than 200 headers"),
    ],
)
async def test_a_head_that_asks_for_an_upgrade_is_refused_as_any_other(
    lines: bytes, status: bytes, text: bytes
) -> None:
    async with GuardedServer(Echo()) as server:
        head = b"GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n" + lines + b"\r\n"
        answer = await server.ask(head)
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert text in answer
