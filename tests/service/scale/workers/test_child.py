from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from service.scale.merged_metrics import MergedMetrics
from service.scale.workers import child
from service.scale.workers.child import Peers


async def start_peers(folder: Path, count: int, started: int) -> list[Peers]:
    """The first ones of so many workers, each with as many images counted as its number says."""
    peers = []
    for index in range(started):
        peer = Peers(folder, index, count)
        peer.metrics = MergedMetrics(peer.collect_all)
        peer.metrics.images.labels("blobs").inc(index)
        await peer.start()
        peers.append(peer)
    return peers


async def test_any_worker_tells_the_metrics_of_all(tmp_path: Path) -> None:
    peers = await start_peers(tmp_path, 3, 3)
    for peer in peers:
        body, media_type = await peer.metrics.answer("")
        lines = body.decode().splitlines()
        assert lines.count("# TYPE solo_images_total counter") == 1
        for index in range(3):
            sample = f'solo_images_total{{model="blobs",replica="{index}"}} {float(index)}'
            assert lines.count(sample) == 1
        assert media_type.startswith("text/plain")
    for peer in peers:
        peer.stop()


async def test_a_worker_that_is_not_there_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (peer,) = await start_peers(tmp_path, 2, 1)
    reports = await peer.collect_all()
    assert [replica for replica, _ in reports] == ["0"]
    assert "worker 1 does not tell its metrics" in caplog.text
    peer.stop()


async def test_a_worker_that_does_not_answer_is_not_waited_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(child, "PEER_TIMEOUT_S", 0.05)
    first, second = await start_peers(tmp_path, 2, 2)

    async def hang() -> None:
        await asyncio.sleep(1)

    monkeypatch.setattr(second.metrics, "collect", hang)
    assert [replica for replica, _ in await first.collect_all()] == ["0"]
    assert "worker 1 does not tell its metrics: TimeoutError" in caplog.text
    for peer in (first, second):
        peer.stop()


async def test_one_that_starts_in_the_place_of_a_dead_one_takes_its_socket(tmp_path: Path) -> None:
    first, dead = await start_peers(tmp_path, 2, 2)
    dead.stop()
    another = Peers(tmp_path, 1, 2)
    another.metrics = MergedMetrics(another.collect_all)
    await another.start()
    assert [replica for replica, _ in await first.collect_all()] == ["0", "1"]
    for peer in (first, another):
        peer.stop()
