"""Engines that hang or run out of memory, in the real server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from benchmarks.load import ask, open_client, read_metrics
from tests.reliability.conftest import Report
from tests.support.blob_model import draw_picture, encode_picture, poisoned_picture
from tests.support.server import CPU_FLAGS, ServerProcess, run_server
from tests.support.slow_model import (
    FOR_EVER,
    ONE_CANVAS,
    TOO_MUCH,
    build_slow_graph,
    publish_graph,
)
from tests.support.waiting import poll_until

PICTURE = encode_picture(draw_picture())
POISON = encode_picture(poisoned_picture())
TIMEOUT_S = 1.0


def read_cpu_s(pid: int) -> float:
    """CPU time of a process, all threads."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


async def wait_until(condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(poll_until, condition, timeout_s=30, pause_s=0.02)


async def hang_among_others(server: ServerProcess, report: Report) -> None:
    """One image on which the engine hangs, and seven that share its batch."""
    async with open_client(server.url) as client:
        began_s = time.monotonic()
        bodies = [PICTURE] * 3 + [POISON] + [PICTURE] * 4
        answers = await asyncio.gather(*(ask(client, "/segment", body) for body in bodies))
        report("seconds_until_all_are_answered", time.monotonic() - began_s)
        assert [answer.status for answer in answers] == [200] * 3 + [500] + [200] * 4
        await wait_until(lambda: httpx.get(f"{server.url}/v2/health/ready").status_code == 200)
        report("seconds_until_ready", time.monotonic() - began_s)
        assert (await ask(client, "/segment", PICTURE)).status == 200


@pytest.mark.parametrize(
    ("delay", "expected_restarts"),
    [(("--max-delay-ms", "300"), 2), ((), 1)],
    ids=["batches: in company, and alone", "lanes"],
)
def test_an_engine_that_hangs_is_replaced_and_costs_one_image(
    tmp_path: Path, report: Report, delay: tuple[str, ...], expected_restarts: int
) -> None:
    graph = build_slow_graph(poisoned_rounds=FOR_EVER)
    publish_graph(tmp_path / "repo", "blobs", graph, input=ONE_CANVAS)
    limits = ("--engine-timeout-s", str(TIMEOUT_S), *delay)
    flags = ("--model-repo", str(tmp_path / "repo"), *CPU_FLAGS, *limits)
    with run_server(tmp_path / "log", *flags) as server:
        asyncio.run(hang_among_others(server, report))
        restarts = read_metrics(server.url)['solo_engine_restarts_total{model="blobs"}']
        before_s = read_cpu_s(server.process.pid)
        time.sleep(1)
        idle_s = read_cpu_s(server.process.pid) - before_s
        server.terminate()
        assert server.wait() == 0
    report("restarts", restarts)
    report("cpu_share_afterwards", idle_s)
    assert restarts == expected_restarts
    assert idle_s < 0.3  # what hung has been ended


@pytest.mark.slow
def test_a_server_ends_while_its_engine_hangs(tmp_path: Path, report: Report) -> None:
    graph = build_slow_graph(poisoned_rounds=FOR_EVER)
    publish_graph(tmp_path / "repo", "blobs", graph, input=ONE_CANVAS)
    limits = ("--drain-timeout-s", "1")
    flags = ("--model-repo", str(tmp_path / "repo"), *CPU_FLAGS, *limits)

    async def hang_and_end(server: ServerProcess) -> int:
        async with open_client(server.url) as client:
            task = asyncio.create_task(ask(client, "/segment", POISON))
            await wait_until(lambda: read_metrics(server.url)["solo_queue_images"] == 1)
            began_s = time.monotonic()
            server.terminate()
            status = await asyncio.to_thread(server.wait, 30)
            report("seconds_to_end", time.monotonic() - began_s)
            assert (await task).status == 503
            return status

    with run_server(tmp_path / "log", *flags) as server:
        assert asyncio.run(hang_and_end(server)) == 0


def test_an_engine_without_memory_costs_one_image_and_no_restart(tmp_path: Path) -> None:
    graph = build_slow_graph(poisoned_floats=TOO_MUCH)
    publish_graph(tmp_path / "repo", "blobs", graph, input=ONE_CANVAS)
    flags = ("--model-repo", str(tmp_path / "repo"), *CPU_FLAGS, "--max-delay-ms", "300")
    with run_server(tmp_path / "log", *flags) as server:
        parts = [("images", (str(i), POISON if i == 3 else PICTURE)) for i in range(8)]
        response = httpx.post(f"{server.url}/segment", files=parts, timeout=60)
        codes = [r.get("error", {}).get("code") for r in response.json()["results"]]
        assert codes == [None] * 3 + ["engine_error"] + [None] * 4
        assert httpx.get(f"{server.url}/v2/health/ready").status_code == 200
        metrics = read_metrics(server.url)
    assert metrics['solo_engine_restarts_total{model="blobs"}'] == 0
