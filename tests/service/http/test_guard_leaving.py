"""Clients that leave, that do not read, and a server that shuts down."""

from __future__ import annotations

import asyncio
import socket

import pytest

from tests.support.guarded import GET, LAST_GET, Echo, GuardedServer, build_post
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("quick_connections")


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
        await client.end_sending()
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
