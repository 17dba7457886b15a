from __future__ import annotations

import asyncio
import resource
from types import SimpleNamespace
from typing import Any

import pytest

from service.http.connections import ConnectionLimit, raise_file_limit
from service.observe.metrics import Metrics
from tests.support.metrics import render

REQUEST = b"POST /segment HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"


class Served(asyncio.Protocol):
    """Replaces uvicorn's protocol: echoes "served" and tracks its connections."""

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
    """A server with a connection limit, on a free port."""

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
        """The first response bytes on a new connection; empty if it was closed."""
        reader, writer = await self.open()
        writer.write(data)
        answer = await reader.read(4096)
        writer.close()
        return answer


async def is_closed(reader: asyncio.StreamReader) -> bool:
    """Whether the connection is closed without a response."""
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


async def test_above_the_limit_it_is_answered_503_with_retry_after() -> None:
    async with Listening(1) as server:
        _, first = await server.open()
        head, _, body = (await server.ask(REQUEST)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert b"\r\nretry-after: 7\r\n" in head
        assert head.endswith(b"\r\nconnection: close")
        assert f"content-length: {len(body)}\r\n".encode() in head
        text = b"the limit of 1 connections is reached"
        assert body == b'{"error":{"code":"overloaded","message":"' + text + b'"}}'
        assert 'reason="connections"} 1.0' in render(server.metrics)
        first.close()
        await asyncio.sleep(0.01)
        assert (await server.ask(REQUEST)).startswith(b"served")


async def test_under_v2_the_error_has_the_protocols_form() -> None:
    async with Listening(1) as server:
        _, first = await server.open()
        answer = await server.ask(REQUEST.replace(b"/segment", b"/v2/models/a/infer"))
        assert b'\r\n\r\n{"error":"the limit of 1 connections' in answer
        first.close()


@pytest.mark.parametrize("data", [b"\xff\xfe", b"GET", b"\r\n\r\n", b"GET  HTTP/1.1\r\n\r\n"])
async def test_malformed_requests_are_rejected_too(data: bytes) -> None:
    async with Listening(1) as server:
        _, first = await server.open()
        assert (await server.ask(data)).startswith(b"HTTP/1.1 503 ")
        first.close()


@pytest.mark.parametrize(
    "path", [b"/healthz", b"/v2/health/live", b"/v2/health/ready", b"/metrics"]
)
async def test_health_and_metrics_are_exempt_from_the_limit(path: bytes) -> None:
    request = b"GET " + path + b" HTTP/1.1\r\n\r\n"
    async with Listening(1) as server:
        _, first = await server.open()
        assert await server.ask(request) == b"served " + request
        first.close()


async def test_a_rejected_connection_that_sends_nothing_times_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.http.connections._LINGER_S", 0.05)
    async with Listening(1) as server:
        _, first = await server.open()
        reader, _ = await server.open()
        assert await is_closed(reader)
        first.close()


async def test_a_rejected_client_that_keeps_sending_receives_the_response() -> None:
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


async def test_the_number_of_connections_in_rejection_is_limited() -> None:
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


def test_only_connections_without_a_request_between_two_calls_are_closed() -> None:
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
    between.cycle = SimpleNamespace(response_complete=True)  # has sent a request in between
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
