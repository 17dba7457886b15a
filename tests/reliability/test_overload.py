"""Behaviours 3 and 5: too much work is turned away, and work nobody waits for is dropped."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from pathlib import Path

import httpx
import pytest

from benchmarks.load import ask, open_client, read_metrics, run_closed_loop
from tests.reliability.conftest import Report
from tests.reliability.overload import PICTURE, measure_overload
from tests.support.blob_model import encode_picture, poisoned_picture
from tests.support.server import CPU_FLAGS, run_server
from tests.support.slow_model import ONE_CANVAS, build_slow_graph, publish_graph
from tests.support.waiting import poll_until

BATCH = 8


def check_overload(tmp_path: Path, report: Report, seconds: float) -> None:
    found = measure_overload(tmp_path, seconds)
    for name, value in asdict(found).items():
        report(name, value if isinstance(value, float) else str(value))
    assert set(found.statuses) == {"200", "503"}
    assert found.retry_after == ["1"]
    assert found.statuses["503"] > found.offered / 2
    assert found.rss_growth_percent < 5
    # p99 < 50 ms is the aim; other work on the machine, this client's too, adds to it.
    assert found.rejection_p50_ms < 1000


def test_five_times_the_load_is_turned_away_at_once(tmp_path: Path, report: Report) -> None:
    check_overload(tmp_path, report, seconds=3)


@pytest.mark.slow
def test_five_times_the_load_for_two_minutes(tmp_path: Path, report: Report) -> None:
    check_overload(tmp_path, report, seconds=120)


async def leave_90_of_100(url: str, report: Report) -> None:
    async with open_client(url) as client:
        plug = asyncio.create_task(ask(client, "/segment", encode_picture(poisoned_picture())))
        await wait_for_queue(url, 1)
        tasks = [asyncio.create_task(ask(client, "/segment", PICTURE)) for _ in range(100)]
        await wait_for_queue(url, 101)
        for task in tasks[5:95]:
            task.cancel()
        began_s = time.monotonic()
        await wait_for_queue(url, 11)
        report("90_left_after_ms", 1e3 * (time.monotonic() - began_s))
        assert not plug.done()
        assert [(await task).status for task in (plug, *tasks[:5], *tasks[95:])] == [200] * 11


async def wait_for_queue(url: str, images: int) -> None:
    def holds() -> bool:
        return read_metrics(url)["solo_queue_images"] == images

    await asyncio.to_thread(poll_until, holds, timeout_s=30, pause_s=0.01)


def test_work_of_clients_that_left_is_not_done(tmp_path: Path, report: Report) -> None:
    """A first image holds the engine for about 2 s, so that the hundred behind it wait."""
    graph = build_slow_graph(poisoned_rounds=200_000)
    publish_graph(tmp_path / "repo", "blobs", graph, input=ONE_CANVAS)
    flags = ("--model-repo", str(tmp_path / "repo"), *CPU_FLAGS, "--max-batch", str(BATCH))
    with run_server(tmp_path / "log", *flags) as server:
        asyncio.run(leave_90_of_100(server.url, report))
        metrics = read_metrics(server.url)
        executed = metrics['solo_batch_size_sum{model="blobs",version="1"}']
        executed -= 1  # without the first image
        left = metrics['solo_cancelled_images_total{model="blobs",reason="client_left"}']
        after = asyncio.run(
            run_closed_loop(server.url, [PICTURE], clients=10, may_go_on=lambda sent: sent < 100)
        )
    report("executed_of_100", executed)
    assert executed <= 10 + BATCH
    assert left == 90
    assert after.statuses == {200: 100}


@pytest.mark.slow
def test_work_past_its_deadline_is_not_done(tmp_path: Path) -> None:
    graph = build_slow_graph(poisoned_rounds=100_000)
    publish_graph(tmp_path / "repo", "blobs", graph, input=ONE_CANVAS)
    flags = ("--model-repo", str(tmp_path / "repo"), *CPU_FLAGS, "--max-batch", str(BATCH))

    async def ask_too_late(url: str) -> None:
        async with open_client(url) as client:
            plug = asyncio.create_task(ask(client, "/segment", encode_picture(poisoned_picture())))
            await wait_for_queue(url, 1)
            late = [ask(client, "/segment?timeout_ms=100", PICTURE) for _ in range(50)]
            assert {answer.status for answer in await asyncio.gather(*late)} == {504}
            assert (await plug).status == 200

    with run_server(tmp_path / "log", *flags) as server:
        asyncio.run(ask_too_late(server.url))
        assert httpx.post(f"{server.url}/segment", content=PICTURE).status_code == 200
        metrics = read_metrics(server.url)
    assert metrics['solo_batch_size_sum{model="blobs",version="1"}'] <= 2 + BATCH
    assert metrics['solo_cancelled_images_total{model="blobs",reason="deadline"}'] == 50
