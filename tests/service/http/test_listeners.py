from __future__ import annotations

import asyncio
import errno
import itertools
import socket
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from service.errors import StartupError
from service.http import listeners as listeners_module
from service.http.accept import Accepter
from service.http.listeners import Listeners, bind, listen
from service.settings import Settings

TIMEOUT_S = 10.0


class Named(asyncio.Protocol):
    """Writes its server's name to each client."""

    def __init__(self, config: Any, server_state: Any, app_state: Any) -> None:
        self._name = app_state

    def connection_made(self, transport: Any) -> None:
        transport.write(self._name)


def build_server(name: bytes) -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(http_protocol_class=Named),
        server_state=None,
        lifespan=SimpleNamespace(state=name),
    )


@pytest.fixture
async def started() -> AsyncIterator[Listeners]:
    listeners = Listeners(Settings(port=0, admin_port=0))
    await listeners.start(build_server(b"main"), build_server(b"admin"))
    yield listeners
    listeners.stop()


async def ask(listener: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setblocking(False)
        async with asyncio.timeout(TIMEOUT_S):
            await loop.sock_connect(client, listener.getsockname())
            return await loop.sock_recv(client, 100)


async def test_each_port_has_its_server(
    started: Listeners, caplog: pytest.LogCaptureFixture
) -> None:
    main, admin = started._sockets
    for _ in range(3):
        assert (await ask(main), await ask(admin)) == (b"main", b"admin")
    address = main.getsockname()
    started.stop()
    started.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, TIMEOUT_S)


async def test_a_server_without_an_admin_port_has_one_socket() -> None:
    listeners = Listeners(Settings(port=0))
    await listeners.start(build_server(b"main"), None)
    (main,) = listeners._sockets
    assert await ask(main) == b"main"
    listeners.stop()


async def test_after_an_error_it_pauses_and_goes_on(
    started: Listeners, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listeners_module, "PAUSE_S", 0.2)
    calls = []

    def fail(self: Accepter) -> Iterator[socket.socket]:
        calls.append(asyncio.get_running_loop().time())
        raise OSError(errno.ENFILE, "Too many open files in system")

    monkeypatch.setattr(Accepter, "accept", fail)
    for _ in range(4):
        assert await ask(started._sockets[0]) == b"main"
    pauses = [later - earlier for earlier, later in itertools.pairwise(calls)]
    assert len(pauses) == 3 and min(pauses) > 0.1
    assert caplog.text.count("connections are refused: [Errno 23] Too many open files") == 1


async def test_it_may_be_stopped_during_a_pause(
    started: Listeners, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listeners_module, "PAUSE_S", 0.05)
    failed = asyncio.Event()

    def fail(self: Accepter) -> Iterator[socket.socket]:
        failed.set()
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Accepter, "accept", fail)
    with socket.create_connection(started._sockets[0].getsockname(), TIMEOUT_S):
        await asyncio.wait_for(failed.wait(), TIMEOUT_S)
        started.stop()
        await asyncio.sleep(0.1)  # an error of the delayed call would be logged by the loop


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(StartupError, match=rf"requests on 127.0.0.1:{port}: .*in use"):
            Listeners(Settings(port=port))
        with pytest.raises(StartupError, match=rf"admin endpoints on 127.0.0.1:{port}: .*in use"):
            Listeners(Settings(port=0, admin_port=port))


def test_a_port_that_another_server_took_meanwhile_is_named() -> None:
    with bind("127.0.0.1", 0, "requests") as first:
        port = first.getsockname()[1]
        with bind("127.0.0.1", port, "requests") as second:
            accepter = listen(first, "running")
            with pytest.raises(StartupError, match=rf"running on 127.0.0.1:{port}: .*in use"):
                listen(second, "running")
            accepter.close()
