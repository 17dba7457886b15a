from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from typing import cast

import pytest
from starlette.types import ASGIApp

from service.http.guard import MAX_HEAD_BYTES, MAX_HEADERS, GuardedProtocol
from service.http.refusals import REFUSAL
from tests.support.guarded import Client, Echo, GuardedServer
from tests.support.metrics import render
from tests.support.waiting import wait_until

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
LAST_GET = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Checks timeouts often; no test may leave an error in the log."""
    monkeypatch.setattr("service.http.connections._CHECK_S", 0.01)
    monkeypatch.setattr("service.http.guard._LINGER_S", 0.2)
    monkeypatch.setattr("service.http.guard._MAX_LINGER_S", 0.6)
    yield
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


def build_post(body: bytes, length: int | None = None) -> bytes:
    announced = len(body) if length is None else length
    return POST + b"Content-Length: %d\r\n\r\n" % announced + body


# Heads


async def test_requests_and_bodies_pass() -> None:
    async with GuardedServer(Echo()) as server:
        client = await server.connect()
        for body in (b"", b"abc", bytes(300_000)):
            await client.send(build_post(body))
            assert await client.read_response() == (200, body)
        answer = await server.ask(CHUNKED + b"3;a=b\r\nabc\r\n2\r\nde\r\n0\r\nX-A: b\r\n\r\n")
        assert answer.endswith(b"\r\n\r\nabcde")


async def test_a_request_may_come_byte_by_byte() -> None:
    async with GuardedServer(Echo()) as server:
        client = await server.connect()
        for byte in build_post(b"abc"):
            await client.send(bytes((byte,)))
            await asyncio.sleep(0)
        assert await client.read_response() == (200, b"abc")


def fill_head(count: int) -> bytes:
    head = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX: "
    return head + b"x" * (count - len(head) - 4) + b"\r\n\r\n"


@pytest.mark.parametrize("piece", [1 << 20, 40_000, 1_000])
async def test_a_head_may_have_as_many_bytes_as_allowed_and_no_more(piece: int) -> None:
    echo = Echo()
    async with GuardedServer(echo) as server:
        for count, status in ((MAX_HEAD_BYTES, b"200"), (MAX_HEAD_BYTES + 1, b"431")):
            head = fill_head(count)
            assert len(head) == count
            client = await server.connect()
            for start in range(0, count, piece):
                await client.send(head[start : start + piece])
                await asyncio.sleep(0)
            assert (await client.read_all()).startswith(b"HTTP/1.1 " + status)
        assert len(echo.requests) == 1
        assert 'reason="head_too_large"} 1.0' in render(server.metrics)


@pytest.mark.parametrize("start", [b"GET /", GET[:-2] + b"X: ", b"\r\n" + GET[:-2] + b"X"])
async def test_a_head_without_an_end_is_refused(start: bytes) -> None:
    async with GuardedServer(Echo()) as server:
        answer = await server.ask(start + b"a" * 3 * MAX_HEAD_BYTES)
        assert answer.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")


async def test_a_large_head_after_another_request_is_refused() -> None:
    async with GuardedServer(Echo()) as server:
        client = await server.connect()
        await client.send(build_post(bytes(100_000)))
        await client.read_response()
        await client.send(fill_head(MAX_HEAD_BYTES + 1))
        assert (await client.read_all()).startswith(b"HTTP/1.1 431 ")


async def test_bytes_of_the_request_before_do_not_count() -> None:
    async with GuardedServer(Echo()) as server:
        client = await server.connect()
        await client.send(build_post(bytes(MAX_HEAD_BYTES - 500)) + fill_head(MAX_HEAD_BYTES - 500))
        assert await client.read_response() == (200, bytes(MAX_HEAD_BYTES - 500))
        assert await client.read_response() == (200, b"")


async def test_a_request_may_have_200_headers_and_no_more() -> None:
    async with GuardedServer(Echo()) as server:
        for count, status in ((MAX_HEADERS, b"200"), (MAX_HEADERS + 1, b"431")):
            lines = b"".join(b"X-%d: a\r\n" % index for index in range(count - 2))
            head = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" + lines + b"\r\n"
            assert (await server.ask(head)).startswith(b"HTTP/1.1 " + status)


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


async def test_a_slow_head_is_answered_408() -> None:
    async with GuardedServer(Echo(), head_timeout_s=0.3) as server:
        client = await server.connect()
        reading = asyncio.ensure_future(client.read_all())
        for _ in range(100):
            if reading.done():
                break
            await client.send(b"\r\n")
            await asyncio.sleep(0.02)
        answer = await reading
        assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        assert b"the headers were not complete after 0.3 s" in answer
        assert 'reason="head_timeout"} 1.0' in render(server.metrics)


async def test_a_connection_without_a_request_is_closed_in_silence() -> None:
    async with GuardedServer(Echo(), head_timeout_s=0.1) as server:
        assert await server.ask(b"") == b""


async def test_between_two_requests_the_keep_alive_time_holds() -> None:
    async with GuardedServer(Echo(), head_timeout_s=0.1, keep_alive_s=0.5) as server:
        client = await server.connect()
        for _ in range(2):
            await client.send(GET)
            assert await client.read_response() == (200, b"")
            await asyncio.sleep(0.25)
        assert await client.read_all() == b""


async def test_a_head_is_not_timed_while_an_earlier_request_is_answered() -> None:
    echo = Echo()
    echo.hold.clear()
    async with GuardedServer(echo, head_timeout_s=0.1) as server:
        client = await server.connect()
        await client.send(build_post(b"abc") + b"GET")
        await asyncio.sleep(0.3)
        echo.hold.set()
        assert await client.read_response() == (200, b"abc")


# Bodies


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"body_timeout_s": 0.2}, b"fewer than 1 bytes of the body came in 0.2 s; 3 bytes"),
        ({"body_timeout_s": 0.2, "min_rate": 1000}, b"fewer than 200 bytes of the body came in"),
        ({"body_total_s": 0.2}, b"the body was not complete after 0.2 s; 3 bytes"),
    ],
)
async def test_a_slow_body_is_refused(limits: dict[str, float], text: bytes) -> None:
    refused: list[str] = []

    async def app(scope: dict[str, object], receive: object, send: object) -> None:
        assert callable(receive)
        assert callable(send)
        state = scope["state"]
        assert isinstance(state, dict)
        while REFUSAL not in state:
            await receive()
        refused.append(str(state[REFUSAL]))
        await send({"type": "http.response.start", "status": 408, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with GuardedServer(app, **limits) as server:  # type: ignore[arg-type]
        answer = await server.ask(build_post(b"abc", 1000))
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in answer
    assert len(refused) == 1
    assert refused[0].encode().startswith(text)


async def test_a_body_that_keeps_its_rate_is_read() -> None:
    async with GuardedServer(Echo(), body_timeout_s=0.2, min_rate=100) as server:
        client = await server.connect()
        await client.send(build_post(b"", 400))
        for _ in range(10):
            await client.send(bytes(40))
            await asyncio.sleep(0.05)
        assert await client.read_response() == (200, bytes(400))


async def test_a_body_that_the_application_does_not_take_is_not_slow() -> None:
    taking = asyncio.Event()
    echo = Echo()

    async def late(scope: object, receive: object, send: object) -> None:
        await taking.wait()
        await echo(scope, receive, send)  # type: ignore[arg-type]

    async with GuardedServer(late, body_timeout_s=0.1) as server:
        client = await server.connect()
        sending = asyncio.ensure_future(client.send(build_post(bytes(30_000_000))))
        await asyncio.sleep(0.5)
        taking.set()
        assert await client.read_response() == (200, bytes(30_000_000))
        await sending


async def refuse_at_once(scope: object, receive: object, send: object) -> None:
    assert callable(send)
    headers = [(b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


async def refuse_late(scope: object, receive: object, send: object) -> None:
    await asyncio.sleep(0.1)
    await refuse_at_once(scope, receive, send)


CLOSES = b"connection: close\r\n"


@pytest.mark.parametrize("request_", [build_post(b"abc", 4), CHUNKED.replace(b"close", b"a")])
@pytest.mark.parametrize("rest", [b"", b"a" * 100_000 + GET])
async def test_an_answer_before_the_end_of_the_body_ends_the_connection(
    request_: bytes, rest: bytes
) -> None:
    async with GuardedServer(refuse_at_once) as server:
        client = await server.connect()
        await client.send(request_)
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 401 ")
        assert CLOSES in head
        await client.send(rest)
        assert await client.read_all() == b""
        assert server.bodies.held == 0


@pytest.mark.parametrize("app", [refuse_at_once, refuse_late])
async def test_an_answer_to_a_complete_body_does_not(app: ASGIApp) -> None:
    async with GuardedServer(app) as server:
        client = await server.connect()
        await client.send(build_post(b"abc", 4))
        if app is refuse_late:
            await client.send(b"d")
            for _ in range(2):
                head = await client.reader.readuntil(b"\r\n\r\n")
                assert CLOSES not in head
                await client.send(build_post(b"abcd"))


async def test_a_client_that_sends_for_long_reads_an_early_answer() -> None:
    async with GuardedServer(refuse_at_once) as server:
        client = await server.connect()
        await client.send(build_post(b"", 1000))
        for _ in range(4):  # longer than a silent one may take
            await client.send(bytes(10))
            await asyncio.sleep(0.1)
        assert (await client.read_all()).startswith(b"HTTP/1.1 401 ")
        assert client.reader.exception() is None


async def test_held_bytes_are_those_of_bodies_without_a_response() -> None:
    echo = Echo()
    echo.hold.clear()
    async with GuardedServer(echo) as server:
        first, second = await server.connect(), await server.connect()
        await first.send(build_post(bytes(1000), 5000))
        await second.send(build_post(bytes(200)))
        await wait_until(lambda: server.bodies.held == 1200)
        await first.send(bytes(4000))
        await wait_until(lambda: server.bodies.held == 5200)
        first.close()
        await wait_until(lambda: server.bodies.held == 200)
        echo.hold.set()
        assert (await second.read_response())[0] == 200
        assert server.bodies.held == 0


async def test_the_largest_unfinished_body_gives_way() -> None:
    echo = Echo()
    echo.hold.clear()
    async with GuardedServer(echo, max_bytes=100_000) as server:
        complete, large, small = [await server.connect() for _ in range(3)]
        await complete.send(build_post(bytes(50_000)))
        await large.send(build_post(bytes(40_000), 60_000))
        await wait_until(lambda: server.bodies.held == 90_000)
        connections = cast(set[GuardedProtocol], server.state.connections)
        assert sorted(other.arriving_bytes for other in connections) == [0, 0, 40_000]
        await small.send(build_post(bytes(20_000)))
        await wait_until(lambda: server.bodies.held == 70_000)
        refusals = [scope["state"].get(REFUSAL) for scope in echo.requests]
        assert [str(found)[:12] for found in refusals] == ["None", "110000 bytes", "None"]
        assert refusals[1].reason == "body_bytes"
        echo.hold.set()
        for client, count in ((complete, 50_000), (small, 20_000)):
            assert await client.read_response() == (200, bytes(count))
        assert server.bodies.held == 0
        large.close()
        await wait_until(lambda: len(server.state.connections) == 2)
        assert server.bodies.held == 0


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


# Upgrades


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


# Pipelining


async def test_pipelined_requests_are_answered_in_their_order() -> None:
    async with GuardedServer(Echo()) as server:
        bodies = [b"%d" % index * 1000 for index in range(10)]
        client = await server.connect()
        await client.send(b"".join(map(build_post, bodies)))
        assert [await client.read_response() for _ in bodies] == [(200, body) for body in bodies]


async def test_the_number_of_pipelined_requests_is_bounded() -> None:
    echo = Echo()
    async with GuardedServer(echo) as server:
        answer = await server.ask(GET * 2000)
        assert answer.count(b"HTTP/1.1 200") == len(echo.requests) == 17


async def test_a_malformed_request_behind_another_does_not_take_its_answer() -> None:
    echo = Echo()
    echo.hold.clear()
    async with GuardedServer(echo) as server:
        client = await server.connect()
        await client.send(build_post(b"abc") + b"nonsense\r\n\r\n")
        await wait_until(lambda: bool(echo.requests))
        echo.hold.set()
        assert await client.read_response() == (200, b"abc")
        assert await client.read_all() == b""


async def test_a_client_that_leaves_its_pipelined_requests_does_no_harm() -> None:
    echo = Echo()
    echo.hold.clear()
    async with GuardedServer(echo) as server:
        client = await server.connect()
        await client.send(build_post(b"abc") * 3)
        await wait_until(lambda: server.bodies.held == 9)
        client.writer.transport.abort()
        echo.hold.set()
        await wait_until(lambda: server.bodies.held == 0)
        assert await server.ask(LAST_GET) != b""


# The end


async def end_sending(client: Client) -> None:
    client.writer.write_eof()
    await asyncio.sleep(0.1)


@pytest.mark.parametrize("wait_s", [0, 0.1, 0.4])
async def test_a_client_that_has_ended_its_sending_side_is_answered(wait_s: float) -> None:
    echo = Echo()
    echo.hold.clear()
    async with GuardedServer(echo) as server:
        client = await server.connect()
        await client.send(build_post(b"abc"))
        await end_sending(client)
        await asyncio.sleep(wait_s)
        echo.hold.set()
        answer = await client.read_all()
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert answer.endswith(b"\r\n\r\nabc")
        assert answer.count(b"HTTP/1.1 ") == 1
    assert echo.left == 0


async def test_pipelined_requests_of_such_a_client_are_answered_too() -> None:
    echo = Echo()
    echo.hold.clear()
    async with GuardedServer(echo) as server:
        client = await server.connect()
        await client.send(build_post(b"abc") * 2 + b"GET")
        await end_sending(client)
        echo.hold.set()
        answer = await client.read_all()
        assert answer.count(b"HTTP/1.1 200 OK\r\n") == 2


async def test_a_client_that_has_left_is_noticed() -> None:
    echo = Echo()
    echo.hold.clear()
    async with GuardedServer(echo) as server:
        clients = [await server.connect() for _ in range(5)]
        for client in clients:
            await client.send(build_post(b"abc"))
        await wait_until(lambda: len(echo.requests) == 5)
        for client in clients:
            client.close()
        await wait_until(lambda: echo.left == 5, 2)
        assert server.bodies.held == 0
        assert not server.state.connections


async def test_a_body_that_is_cut_is_a_client_that_has_left() -> None:
    echo = Echo()
    async with GuardedServer(echo) as server:
        client = await server.connect()
        await client.send(build_post(b"abc", 10))
        await end_sending(client)
        assert await client.read_all() == b""
    assert echo.left == 1


async def connect_without_reading(server: GuardedServer, buffer_bytes: int = 4096) -> socket.socket:
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    held.setblocking(False)
    await asyncio.get_running_loop().sock_connect(held, ("127.0.0.1", server.port))
    return held


async def answer_much(scope: object, receive: object, send: object) -> None:
    assert callable(send)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(200):
        await send({"type": "http.response.body", "body": bytes(100_000), "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


@pytest.mark.parametrize("request_", [GET, LAST_GET])
async def test_a_client_that_does_not_read_is_cut_off(request_: bytes) -> None:
    async with GuardedServer(answer_much, write_timeout_s=0.2) as server:
        held = await connect_without_reading(server)
        await asyncio.get_running_loop().sock_sendall(held, request_)
        await wait_until(lambda: bool(server.state.connections))
        await wait_until(lambda: not server.state.connections)
        held.close()


async def answer_once(scope: object, receive: object, send: object) -> None:
    assert callable(send)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": bytes(20_000_000)})


@pytest.mark.parametrize("request_", [GET, LAST_GET])
async def test_so_is_one_whose_response_is_complete(request_: bytes) -> None:
    async with GuardedServer(answer_once, write_timeout_s=0.2, keep_alive_s=0.05) as server:
        held = await connect_without_reading(server)
        await asyncio.get_running_loop().sock_sendall(held, request_)
        await wait_until(lambda: bool(server.state.connections))
        await wait_until(lambda: not server.state.connections)
        held.close()


async def test_a_client_that_reads_slowly_but_steadily_gets_all() -> None:
    loop = asyncio.get_running_loop()
    async with GuardedServer(answer_once, write_timeout_s=0.4, min_rate=1000) as server:
        held = await connect_without_reading(server, 200_000)
        await loop.sock_sendall(held, LAST_GET)
        received, began_s = 0, loop.time()
        while data := await loop.sock_recv(held, 1_000_000):
            received += len(data)
            if loop.time() - began_s < 1.5:
                await asyncio.sleep(0.05)
        assert received > 20_000_000
        held.close()


async def test_a_refused_client_that_goes_on_sending_reads_the_answer() -> None:
    async with GuardedServer(Echo()) as server:
        client = await server.connect()
        with pytest.raises(ConnectionError):
            client.writer.write(b"nonsense\r\n\r\n")
            for _ in range(2000):
                await client.send(bytes(10_000))
                await asyncio.sleep(0.001)
        assert not server.state.connections


async def test_shutdown_closes_what_is_not_in_work_and_finishes_the_rest() -> None:
    echo = Echo()
    echo.hold.clear()
    async with GuardedServer(echo) as server:
        silent, partial, idle, busy = [await server.connect() for _ in range(4)]
        await partial.send(b"GET / HTTP")
        echo.hold.set()
        await idle.send(GET)
        assert await idle.read_response() == (200, b"")
        echo.hold.clear()
        await busy.send(build_post(b"abc"))
        await wait_until(lambda: len(echo.requests) == 2)
        for connection in tuple(server.state.connections):
            connection.shutdown()
        assert [await client.read_all() for client in (silent, partial, idle)] == [b""] * 3
        echo.hold.set()
        assert await busy.read_response() == (200, b"abc")
        assert await busy.read_all() == b""
