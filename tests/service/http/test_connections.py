from __future__ import annotations

import asyncio
import resource

import pytest

from service.errors import Draining
from service.http.connections import raise_file_limit
from service.http.refusals import REFUSAL
from tests.support.guarded import Client, Echo, GuardedServer
from tests.support.metrics import render
from tests.support.waiting import wait_until

POST = b"POST /segment HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"
REJECTED = 'solo_rejections_total{reason="connections"} %.1f'
HEALTH = (b"/healthz", b"/v2/health/live", b"/v2/health/ready", b"/metrics", b"/metrics?a=b")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.http.connections._CHECK_S", 0.01)
    monkeypatch.setattr("service.http.guard._LINGER_S", 0.3)
    monkeypatch.setattr("service.http.guard._EXCESS_HEAD_TIMEOUT_S", 0.3)


def get(path: bytes, method: bytes = b"GET") -> bytes:
    return method + b" " + path + b" HTTP/1.1\r\nHost: a\r\n\r\n"


async def fill(server: GuardedServer) -> list[Client]:
    return [await server.connect() for _ in range(server.guard.settings.max_connections)]


async def test_up_to_the_limit_a_connection_is_served() -> None:
    async with GuardedServer(Echo(), max_connections=2) as server:
        await server.connect()
        client = await server.connect()
        for _ in range(3):
            await client.send(POST)
            assert await client.read_response() == (200, b"abc")
        assert REJECTED % 0 in render(server.metrics)


async def test_above_the_limit_it_is_answered_503_with_retry_after() -> None:
    echo = Echo()
    async with GuardedServer(echo, max_connections=1) as server:
        (first,) = await fill(server)
        head, _, body = (await server.ask(POST)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert b"\r\nretry-after: 7\r\n" in head
        assert head.endswith(b"\r\nconnection: close")
        assert f"content-length: {len(body)}\r\n".encode() in head
        text = b"the limit of 1 connections is reached"
        assert body == b'{"error":{"code":"overloaded","message":"' + text + b'"}}'
        assert REJECTED % 1 in render(server.metrics)
        first.close()
        await wait_until(lambda: not server.state.connections)
        client = await server.connect()
        await client.send(POST)
        assert await client.read_response() == (200, b"abc")
    assert len(echo.requests) == 1


async def test_under_v2_the_error_has_the_protocols_form() -> None:
    async with GuardedServer(Echo(), max_connections=1) as server:
        await fill(server)
        answer = await server.ask(POST.replace(b"/segment", b"/v2/models/a/infer"))
        assert b'\r\n\r\n{"error":"the limit of 1 connections' in answer


@pytest.mark.parametrize("path", HEALTH)
@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
async def test_health_and_metrics_are_served_above_the_limit(path: bytes, method: bytes) -> None:
    async with GuardedServer(Echo(), max_connections=1) as server:
        await fill(server)
        answer = await server.ask(get(path, method))
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"connection: close\r\n" in answer


@pytest.mark.parametrize(
    "request_",
    [get(b"/segment"), get(b"/healthz", b"POST"), get(b"/healthz/x"), get(b"/metricsx"), get(b"/")],
)
async def test_nothing_else_is(request_: bytes) -> None:
    echo = Echo()
    async with GuardedServer(echo, max_connections=1) as server:
        await fill(server)
        assert (await server.ask(request_)).startswith(b"HTTP/1.1 503 ")
    assert not echo.requests


@pytest.mark.parametrize("pieces", [1, 2])
async def test_a_health_connection_serves_one_request(pieces: int) -> None:
    echo = Echo()
    async with GuardedServer(echo, max_connections=1) as server:
        await fill(server)
        client = await server.connect()
        if pieces == 1:
            await client.send(get(b"/healthz") + POST + get(b"/healthz"))
        else:
            await client.send(get(b"/healthz"))
            await asyncio.sleep(0.05)
            await client.send(POST)
        assert (await client.read_all()).count(b"HTTP/1.1 ") == 1
    assert [scope["path"] for scope in echo.requests] == ["/healthz"]


async def test_a_body_of_a_health_request_is_not_read() -> None:
    async with GuardedServer(Echo(), max_connections=1) as server:
        await fill(server)
        request = get(b"/healthz").replace(b"a\r\n\r\n", b"a\r\nContent-Length: 9000000\r\n\r\n")
        answer = await server.ask(request + bytes(100_000))
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert server.bodies.held == 0


async def test_health_requests_served_at_once_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.http.connections._MAX_SERVED_IN_EXCESS", 2)
    echo = Echo()
    echo.hold.clear()
    async with GuardedServer(echo, max_connections=5) as server:
        await fill(server)
        served = [await server.connect() for _ in range(2)]
        for client in served:
            await client.send(get(b"/healthz"))
        await wait_until(lambda: len(echo.requests) == 2)
        assert (await server.ask(get(b"/healthz"))).startswith(b"HTTP/1.1 503 ")
        echo.hold.set()
        assert [(await client.read_response())[0] for client in served] == [200, 200]


async def test_one_above_the_limit_that_sends_no_request_is_closed_soon() -> None:
    async with GuardedServer(Echo(), max_connections=1) as server:
        await fill(server)
        assert await server.ask(b"") == b""
        assert (await server.ask(b"GET /healthz HTTP/1.1\r\n")).startswith(b"HTTP/1.1 503 ")


async def test_a_rejected_client_that_keeps_sending_receives_the_response() -> None:
    async with GuardedServer(Echo(), max_connections=1) as server:
        await fill(server)
        client = await server.connect()
        reading = asyncio.ensure_future(client.read_all())
        for _ in range(20):
            client.writer.write(POST * 1000)
            await asyncio.sleep(0.002)
        answer = await reading
        assert answer.count(b"HTTP/1.1 503 ") == answer.count(b"HTTP/1.1") == 1


async def test_those_above_the_limit_are_bounded_and_give_way_to_newer_ones() -> None:
    async with GuardedServer(Echo(), max_connections=3) as server:
        await fill(server)
        waiting = [await server.connect() for _ in range(10)]
        assert len(server.state.connections) <= 6
        assert [await client.read_all() for client in waiting[:7]] == [b""] * 7
        assert (await server.ask(get(b"/healthz"))).startswith(b"HTTP/1.1 200 ")


async def test_connections_that_come_at_once_are_bounded_too() -> None:
    async with GuardedServer(Echo(), max_connections=3) as server:
        await asyncio.gather(*(server.connect() for _ in range(50)))
        await wait_until(lambda: len(server.state.connections) <= 6)


async def test_two_servers_share_the_bytes_of_bodies_alone() -> None:
    async with GuardedServer(Echo(), max_connections=1) as one, GuardedServer(Echo()) as other:
        other.guard.bodies = one.bodies
        await fill(one)
        client = await other.connect()
        await client.send(POST[:-1])
        await wait_until(lambda: one.bodies.held == 2)


async def test_bodies_that_arrive_are_refused_and_others_are_not() -> None:
    echo = Echo()
    echo.hold.clear()
    async with GuardedServer(echo) as server:
        arriving, complete = await server.connect(), await server.connect()
        await arriving.send(POST[:-1])
        await complete.send(POST)
        await wait_until(lambda: len(echo.requests) == 2)
        server.guard.refuse_bodies(Draining("the server is going down"))
        states = [scope["state"] for scope in echo.requests]
        assert sum(REFUSAL in state for state in states) == 1
        echo.hold.set()
        assert await complete.read_response() == (200, b"abc")


async def test_all_can_be_closed_at_once() -> None:
    echo = Echo()
    echo.hold.clear()
    async with GuardedServer(echo, max_connections=2) as server:
        clients = [*await fill(server), await server.connect()]
        await clients[0].send(POST)
        await wait_until(lambda: bool(echo.requests))
        server.guard.abort()
        assert [await client.read_all() for client in clients] == [b""] * 3
        await wait_until(lambda: echo.left == 1)
        assert not server.state.connections


@pytest.mark.parametrize(
    ("soft", "hard", "allowed", "warned"),
    [
        (100, 5000, 2200, False),
        (100, resource.RLIM_INFINITY, 2200, False),
        (100, 2000, 2000, True),
        (2200, 5000, None, False),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None, False),
    ],
)
def test_the_file_limit_is_raised_up_to_the_hard_limit(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    soft: int,
    hard: int,
    allowed: int | None,
    warned: bool,
) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: limits.append(both))
    raise_file_limit(1000)
    assert limits == ([] if allowed is None else [(allowed, hard)])
    assert ("1000 connections may need 2200 open files" in caplog.text) == warned
