from __future__ import annotations

import asyncio
from typing import cast

import pytest
from starlette.types import ASGIApp

from service.http.guard import MAX_HEAD_BYTES, MAX_HEADERS, GuardedProtocol
from service.http.refusals import REFUSAL
from tests.support.guarded import CHUNKED, GET, Echo, GuardedServer, build_post
from tests.support.metrics import render
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("quick_connections")

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


@pytest.mark.parametrize(("pieces", "is_open"), [(4, True), (5, False)])
async def test_a_client_that_sends_more_than_a_body_may_have_is_cut(
    monkeypatch: pytest.MonkeyPatch, pieces: int, is_open: bool
) -> None:
    for name in ("_LINGER_S", "_MAX_LINGER_S"):
        monkeypatch.setattr(f"service.http.guard.{name}", 60)
    async with GuardedServer(refuse_at_once, max_body_bytes=400) as server:
        client = await server.connect()
        await client.send(build_post(b"", 1000))
        assert (await client.read_response())[0] == 401
        for _ in range(pieces):
            await client.send(bytes(100))
            await asyncio.sleep(0.02)
        if is_open:
            assert server.state.connections
        else:
            await wait_until(lambda: not server.state.connections)


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


# The end


@pytest.mark.parametrize("wait_s", [0, 0.1, 0.4])
async def test_a_client_that_has_ended_its_sending_side_is_answered(wait_s: float) -> None:
    echo = Echo()
    echo.hold.clear()
    async with GuardedServer(echo) as server:
        client = await server.connect()
        await client.send(build_post(b"abc"))
        await client.end_sending()
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
        await client.end_sending()
        echo.hold.set()
        answer = await client.read_all()
        assert answer.count(b"HTTP/1.1 200 OK\r\n") == 2
