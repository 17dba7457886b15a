"""Behaviours 8 and 11: a server ends without losing what it took, and never lies of its device."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from benchmarks.load import NO_ANSWER, Load, read_metrics, run_closed_loop
from service.engines.driver import Gpu, find_gpu
from tests.reliability.conftest import Report
from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.server import CPU_FLAGS, ServerProcess, run_server
from tests.support.slow_model import ONE_CANVAS, build_slow_graph, publish_graph
from tests.support.waiting import poll_until

PICTURE = encode_picture(draw_picture())


def test_sigterm_under_load_loses_nothing_that_was_accepted(tmp_path: Path, report: Report) -> None:
    graph = build_slow_graph(rounds=4000)
    publish_graph(tmp_path / "repo", "blobs", graph, input=ONE_CANVAS)
    flags = ("--model-repo", str(tmp_path / "repo"), *CPU_FLAGS, "--max-batch", "2")
    with run_server(tmp_path / "log", *flags) as server, ThreadPoolExecutor(2) as pool:
        before = pool.submit(send, server, lambda sent: sent < 32)
        # Sent is not yet accepted.
        poll_until(lambda: count_accepted(server.url) >= 32, timeout_s=30, pause_s=0.01)
        ordered_s = time.monotonic()
        server.terminate()
        with httpx.Client(base_url=server.url, timeout=60) as client:
            poll_until(
                lambda: client.get("/v2/health/ready").status_code == 503, timeout_s=30, pause_s=0
            )
            report("not_ready_after_ms", 1e3 * (time.monotonic() - ordered_s))
            later = pool.submit(send, server, lambda _: server.process.poll() is None)
            assert client.get("/v2/health/live").status_code == 200
        assert server.wait() == 0
        report("ended_after_s", time.monotonic() - ordered_s)
    accepted = before.result().answers
    in_work = [a for a in accepted if a.sent_s + a.seconds > ordered_s]
    report("in_work_at_sigterm", len(in_work))
    assert len(in_work) >= 16
    assert Counter(a.status for a in accepted) == {200: 32}
    assert 503 in later.result().statuses
    assert set(later.result().statuses) <= {503, NO_ANSWER}
    assert "Traceback" not in server.read_log()


def send(server: ServerProcess, may_go_on: Callable[[int], bool]) -> Load:
    """Pictures from 32 clients."""
    load = run_closed_loop(server.url, [PICTURE], clients=32, may_go_on=may_go_on)
    return asyncio.run(load)


def count_accepted(url: str) -> float:
    """Images in work or done."""
    metrics = read_metrics(url)
    return metrics["solo_queue_images"] + metrics.get(
        'solo_images_total{model="blobs",version="1"}', 0
    )


@pytest.mark.skipif(isinstance(find_gpu(), Gpu), reason="this machine has a GPU")
def test_cuda_where_there_is_none_ends_soon_with_the_reason(tmp_path: Path, report: Report) -> None:
    publish(tmp_path / "repo")
    began_s = time.monotonic()
    flags = ("--device", "cuda", "--model-repo", str(tmp_path / "repo"))
    server = ServerProcess(tmp_path / "log", *flags)
    assert server.wait(60) == 1
    seconds = time.monotonic() - began_s
    report("ended_after_s", seconds)
    assert f"solo-serve: error: device cuda: {find_gpu()}" in server.read_log()
    assert seconds < 30  # 10 is the aim; other work on the machine adds to it


def test_auto_says_what_it_took(tmp_path: Path) -> None:
    publish(tmp_path / "repo")
    with run_server(tmp_path / "log", "--model-repo", str(tmp_path / "repo")) as server:
        ready = httpx.get(f"{server.url}/v2/health/ready").json()
        metrics = read_metrics(server.url)
    device = "cuda" if isinstance(find_gpu(), Gpu) else "cpu"
    (engine,) = ready["engines"]
    assert engine["device"] == device
    assert engine["reason"]
    assert any(f'device="{device}"' in name for name in metrics if "solo_model_info" in name)
