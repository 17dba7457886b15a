from __future__ import annotations

import asyncio
import resource
from types import SimpleNamespace
from typing import Any

import pytest

from service.http.connections import ConnectionLimit, allow_files
from service.observe.metrics import Metrics
from tests.support.metrics import render

REQUEST = b"POST /segment HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"


class Served(asyncio.Protocol):
    """Stands for uvicorn's protocol: says so, and counts itself."""

    def __init__(self, _config: Any, state: Any, _app_state: Any, _loop: Any) -> None:
        self._connections = state.connections
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._connections.add(self)

    def data_received(self, data: bytes) -> None:
        self._transport.write(b"served " + data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)


class Listening:
    """A server with a limit of connections, on a port of its own."""

    def __init__(self, max_connections: int) -> None:
        self.metrics = Metrics()
        self.limit = ConnectionLimit(max_connections, 7, self.metrics, Served)
        self.state: Any = SimpleNamespace(connections=set())

    async def __aenter__(self) -> Listening:
        loop = asyncio.get_running_loop()
        config: Any = None
        self._server = await loop.create_server(
            lambda: self.limit(config, self.state, {}), "127.0.0.1", 0
        )
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        streams = await asyncio.open_connection("127.0.0.1", self._port)
        await asyncio.sleep(0.01)  # until it is accepted
        return streams

    async def ask(self, data: bytes) -> bytes:
        """What comes back first on a new connection; empty: it was closed."""
        reader, writer = await self.open()
        writer.write(data)
        answer = await reader.read(4096)
        writer.close()
        return answer


async def is_closed(reader: asyncio.StreamReader) -> bool:
    """Whether the connection ends without an answer."""
    try:
        return not await asyncio.wait_for(reader.read(), 30)
    except ConnectionResetError:
        return True


async def test_up_to_the_limit_a_connection_is_served() -> None:
    async with Listening(2) as server:
        _, first = await server.open()
        assert await server.ask(REQUEST) == b"served " + REQUEST
        assert 'reason="connections"} 0.0' in render(server.metrics)
        first.close()


async def test_beyond_the_limit_it_is_told_when_to_come_again() -> None:
    async with Listening(1) as server:
        _, first = await server.open()
        head, _, body = (await server.ask(REQUEST)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert b"\r\nretry-after: 7\r\n" in head
        assert head.endswith(b"\r\nconnection: close")
        assert f"content-length: {len(body)}\r\n".encode() in head
        text = b"1 connections are open, the server takes no more"
        assert body == b'{"error":{"code":"overloaded","message":"' + text + b'"}}'
        assert 'reason="connections"} 1.0' in render(server.metrics)
        first.close()
        await asyncio.sleep(0.01)
        assert (await server.ask(REQUEST)).startswith(b"served")


async def test_the_other_protocol_is_answered_in_its_own_words() -> None:
    async with Listening(1) as server:
        _, first = await server.open()
        answer = await server.ask(REQUEST.replace(b"/segment", b"/v2/models/a/infer"))
        assert b'\r\n\r\n{"error":"1 connections' in answer
        first.close()


@pytest.mark.parametrize("data", [b"\xff\xfe", b"GET", b"\r\n\r\n", b"GET  HTTP/1.1\r\n\r\n"])
async def test_nonsense_is_turned_away_as_well(data: bytes) -> None:
    async with Listening(1) as server:
        _, first = await server.open()
        assert (await server.ask(data)).startswith(b"HTTP/1.1 503 ")
        first.close()


@pytest.mark.parametrize(
    "path", [b"/healthz", b"/v2/health/live", b"/v2/health/ready", b"/metrics"]
)
async def test_health_and_metrics_are_served_all_the_same(path: bytes) -> None:
    request = b"GET " + path + b" HTTP/1.1\r\n\r\n"
    async with Listening(1) as server:
        _, first = await server.open()
        assert await server.ask(request) == b"served " + request
        first.close()


async def test_who_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.http.connections._LINGER_S", 0.05)
    async with Listening(1) as server:
        _, first = await server.open()
        reader, _ = await server.open()
        assert await is_closed(reader)
        first.close()


async def test_a_client_that_goes_on_sending_still_sees_the_answer() -> None:
    async with Listening(1) as server:
        _, first = await server.open()
        reader, writer = await server.open()
        for _ in range(50):
            writer.write(REQUEST * 1000)
            await writer.drain()
        assert (await reader.readline()).startswith(b"HTTP/1.1 503 ")
        assert (await reader.read()).count(b"HTTP/1.1") == 0
        writer.close()
        first.close()


async def test_even_those_that_wait_to_be_turned_away_are_bounded() -> None:
    async with Listening(2) as server:
        opened = [await server.open() for _ in range(5)]
        assert await is_closed(opened[4][0])
        assert len(server.state.connections) == 2
        for _, writer in opened:
            writer.close()
        await asyncio.sleep(0.01)
        assert (await server.ask(REQUEST)).startswith(b"served")


def connect(cycle: Any) -> Any:
    closed: list[bool] = []
    transport = SimpleNamespace(close=lambda: closed.append(True))
    return type("Connection", (), {"cycle": cycle, "transport": transport, "closed": closed})()


def test_only_a_connection_without_a_request_for_two_looks_is_closed() -> None:
    limit = ConnectionLimit(9, 1, Metrics(), Served)
    done = SimpleNamespace(response_complete=True)
    silent, between, at_work = (
        *(connect(None), connect(done)),
        connect(SimpleNamespace(response_complete=False)),
    )
    state: Any = SimpleNamespace(connections={silent, between, at_work})
    limit(None, state, {})  # type: ignore[arg-type]
    limit.close_silent()
    assert not silent.closed
    between.cycle = SimpleNamespace(response_complete=True)  # it has asked meanwhile
    late = connect(None)
    state.connections.add(late)
    limit.close_silent()
    assert silent.closed
    assert not any(connection.closed for connection in (between, at_work, late))


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
def test_the_limit_of_files_is_raised_as_far_as_it_may(
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
    allow_files(1000)
    assert limits == ([] if allowed is None else [(allowed, hard)])
    assert ("1000 connections may need 2200 open files" in caplog.text) == warned
