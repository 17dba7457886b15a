from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.scale.workers import child
from service.scale.workers.channel import ADMIN, MAIN, Order, ParentEnd, State, WorkerEnd
from service.scale.workers.child import Intake
from tests.support.waiting import wait_until

TIMEOUT_S = 10.0


class Greeter(asyncio.Protocol):
    """Writes its server's name to each client, and counts as a connection of it."""

    def __init__(self, config: Any, server_state: Any, app_state: Any) -> None:
        self._name, self._connections = app_state, server_state.connections

    def connection_made(self, transport: Any) -> None:
        self._connections.add(self)
        transport.write(self._name)

    def connection_lost(self, error: Exception | None) -> None:
        self._connections.discard(self)


class FakeServer:
    """As much of uvicorn's server as an intake uses."""

    def __init__(self, name: bytes) -> None:
        self.config = SimpleNamespace(http_protocol_class=Greeter)
        self.server_state = SimpleNamespace(connections=set())
        self.lifespan = SimpleNamespace(state=name)
        self.signals: list[int] = []

    def handle_signal(self, number: int) -> None:
        self.signals.append(number)


class Harness:
    """A parent's end of the channel, and an intake with a main and an admin server."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self.parent = ParentEnd(ours)
        self.segmenter = SimpleNamespace(is_ready=True, failure=None)
        self.peers = SimpleNamespace(asked=[], found=[])
        self.peers.write_to = self.peers.asked.append
        self.peers.read_from = lambda *found: self.peers.found.append(found)
        self.servers: Any = (FakeServer(b"main"), FakeServer(b"admin"))
        segmenter: Any = self.segmenter
        peers: Any = self.peers
        self._worker = theirs
        self.intake = Intake(WorkerEnd(theirs), segmenter, peers)

    async def start(self) -> None:
        await self.intake.start(*self.servers)

    async def expect(self, condition: Callable[[], bool]) -> None:
        def holds() -> bool:
            self.parent.read()
            return condition()

        await wait_until(holds, TIMEOUT_S)

    def connect(self, listener: int) -> socket.socket:
        client, served = socket.socketpair()
        client.setblocking(False)
        assert self.parent.pass_connection(listener, served)
        return client

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._worker)
        self._worker.close()
        self.parent.channel.close()


@pytest.fixture
async def harness() -> AsyncIterator[Harness]:
    built = Harness()
    await built.start()
    yield built
    built.close()


async def receive(client: socket.socket) -> bytes:
    return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 100), TIMEOUT_S)


async def test_connections_go_to_the_servers_of_their_listeners(harness: Harness) -> None:
    with harness.connect(MAIN) as client, harness.connect(ADMIN) as admin:
        assert (await receive(client), await receive(admin)) == (b"main", b"admin")
        await harness.expect(lambda: harness.parent.connections == 2)
        assert harness.parent.take_back() == []
    await harness.expect(lambda: harness.parent.connections == 0)


async def test_a_connection_is_reported_before_it_is_read(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent gives one that was not reported to another worker if this one dies."""
    reports: list[int] = []
    made = Greeter.connection_made

    def connection_made(self: Greeter, transport: Any) -> None:
        harness.parent.read()
        reports.append(len(harness.parent.take_back()))
        made(self, transport)

    monkeypatch.setattr(Greeter, "connection_made", connection_made)
    with harness.connect(MAIN) as client:
        assert await receive(client) == b"main"
    assert reports == [0]


async def test_it_reports_again_and_again_as_long_as_its_event_loop_runs(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "BEAT_S", 0.01)
    heard = set()

    def count() -> bool:
        heard.add(harness.parent.heard_s)
        return len(heard) >= 5

    await harness.expect(count)
    harness.intake.stop()  # also while it shuts down
    heard.clear()
    await harness.expect(count)
    assert harness.parent.state is State.CLOSED


async def test_it_reports_what_becomes_of_new_connections(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "BEAT_S", 0.01)
    await harness.expect(lambda: harness.parent.state is State.SERVES)
    harness.segmenter.is_ready = False
    await harness.expect(lambda: harness.parent.state is State.REFUSES)
    harness.segmenter.failure = "the engine has failed"
    await harness.expect(lambda: harness.parent.state is State.FAILED)
    harness.intake.stop()
    await harness.expect(lambda: harness.parent.state is State.CLOSED)
    with harness.connect(MAIN) as client:
        await harness.expect(lambda: harness.parent.connections == 0)
        assert await receive(client) == b""


async def test_other_messages_reach_their_receivers(harness: Harness) -> None:
    harness.parent.send(Order.SIGNAL, signal.SIGHUP)
    harness.parent.send(Order.METRICS, 3, 17)
    with socket.socket() as carried:
        harness.parent.send(Order.COLLECT, carried=carried)
    await harness.expect(lambda: len(harness.peers.asked) == 1)
    assert harness.servers[0].signals == [signal.SIGHUP]
    assert harness.peers.found == [(3, 17, None)]
    harness.peers.asked[0].close()


async def test_a_lost_descriptor_is_a_warning_and_no_signal(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(50):
        harness.parent.send(Order.CONNECTION, MAIN)  # what a receiver without descriptors sees
    await harness.expect(lambda: "no file descriptor left" in caplog.text)
    with harness.connect(MAIN) as client:
        assert await receive(client) == b"main"
    assert caplog.text.count("a connection is refused") == 1
    assert harness.servers[0].signals == []


async def test_the_end_of_the_parent_drains(harness: Harness) -> None:
    harness.parent.channel.close()
    await wait_until(lambda: harness.servers[0].signals == [signal.SIGTERM])


ORPHAN = """
import multiprocessing, sys, time
from service.scale.workers.child import end_with_parent

def hang(limit_s):
    end_with_parent(limit_s)
    print("hangs", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=hang, args=(0.1,))
    process.start()
    time.sleep(600)
"""


def test_a_worker_that_hangs_ends_after_its_parent(tmp_path: Path) -> None:
    (tmp_path / "orphan.py").write_text(ORPHAN)
    root = str(Path(__file__).parents[4])
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "orphan.py")],
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": root},
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"hangs\n"
        parent.kill()
        assert parent.stdout.read() == b""  # comes when the worker has ended too
