from __future__ import annotations

import asyncio
import pickle
import socket
from functools import partial

import pytest

from service.scale.workers import peers as peers_module
from service.scale.workers.peers import Peers
from tests.support.waiting import wait_until


class Exchange:
    """Workers that each have counted as many images as their number, and their parent.

    Attributes:
        missing: Numbers of workers that the parent knows to be unavailable.
        silent: Numbers of those that are asked and do not write.
        broken: Numbers of those that end while they write.
        kept: Sockets of the silent ones.
    """

    def __init__(self, count: int) -> None:
        self.missing: set[int] = set()
        self.silent: set[int] = set()
        self.broken: set[int] = set()
        self.kept: list[socket.socket] = []
        self.workers = [Peers(i, count, partial(self._connect, i)) for i in range(count)]
        for index, worker in enumerate(self.workers):
            worker.metrics.images.labels("blobs", 1).inc(index)

    def _connect(self, asker: int, tag: int) -> None:
        for index, worker in enumerate(self.workers):
            if index == asker:
                continue
            if index in self.missing:
                self.workers[asker].read_from(index, tag, None)
                continue
            ours, theirs = socket.socketpair()
            self.workers[asker].read_from(index, tag, ours)
            if index in self.silent:
                self.kept.append(theirs)
            elif index in self.broken:
                theirs.sendall(pickle.dumps(["metrics"] * 100)[:50])
                theirs.close()
            else:
                worker.write_to(theirs)

    async def ask(self, index: int) -> list[str]:
        return [name for name, _ in await self.workers[index].collect_all()]


async def test_any_worker_tells_the_metrics_of_all() -> None:
    exchange = Exchange(3)
    for worker in exchange.workers:
        body, media_type = await worker.metrics.answer("")
        lines = body.decode().splitlines()
        assert lines.count("# TYPE solo_images_total counter") == 1
        for index in range(3):
            sample = (
                f'solo_images_total{{model="blobs",replica="{index}",version="1"}} {float(index)}'
            )
            assert lines.count(sample) == 1
        assert media_type.startswith("text/plain")


async def test_requests_at_once_do_not_mix() -> None:
    exchange = Exchange(3)
    asked = [exchange.ask(index) for index in (0, 0, 1, 2, 2)]
    assert await asyncio.gather(*asked) == [["0", "1", "2"]] * 5
    assert not any(worker._expected or worker._tasks for worker in exchange.workers)


async def test_a_single_worker_has_its_own_metrics() -> None:
    assert await Exchange(1).ask(0) == ["0"]


@pytest.mark.parametrize("fault", ["missing", "silent", "broken"])
async def test_a_worker_that_does_not_answer_is_left_out(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(peers_module, "TIMEOUT_S", 0.05)
    exchange = Exchange(3)
    getattr(exchange, fault).add(1)
    assert await exchange.ask(0) == ["0", "2"]
    assert "/metrics is without worker 1, which does not answer" in caplog.text
    assert "worker 2" not in caplog.text
    getattr(exchange, fault).clear()
    assert await exchange.ask(0) == ["0", "1", "2"]
    for connection in exchange.kept:
        connection.close()


async def test_answers_that_come_too_late_are_closed() -> None:
    worker = Exchange(2).workers[0]
    ours, theirs = socket.socketpair()
    with ours:
        worker.read_from(1, 99, theirs)
        worker.read_from(1, 99, None)
        assert ours.recv(1) == b""


async def test_a_worker_that_nobody_reads_is_not_held_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers_module, "TIMEOUT_S", 0.05)
    worker = Exchange(2).workers[0]
    ours, theirs = socket.socketpair()
    with ours:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        worker.write_to(theirs)
        worker.write_to(None)  # its descriptor was lost
        await wait_until(lambda: not worker._tasks)
        assert theirs.fileno() == -1
