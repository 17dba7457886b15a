"""Behaviour 6: models are replaced under load; whoever asks notices nothing but the version."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from benchmarks.load import Load, read_metrics, run_closed_loop
from tests.reliability.conftest import Report
from tests.support.blob_model import build_graph, draw_picture, encode_picture
from tests.support.memory import read_resident_bytes
from tests.support.server import CPU_FLAGS, ServerProcess, run_server
from tests.support.slow_model import publish_graph

PICTURE = encode_picture(draw_picture())


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    publish_graph(tmp_path / "repo", "blobs", build_graph())
    return tmp_path / "repo"


@pytest.fixture
def server(repo: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    flags = ("--model-repo", str(repo), "--model-control", "true", *CPU_FLAGS)
    with run_server(tmp_path / "log", *flags) as running:
        yield running


@contextmanager
def asked_all_the_time(url: str) -> Iterator[Load]:
    """Four clients ask until the block ends; the load is filled then."""
    stop, load = threading.Event(), Load()

    def ask() -> Load:
        return asyncio.run(
            run_closed_loop(url, [PICTURE], clients=4, may_go_on=lambda _: not stop.is_set())
        )

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask)
        try:
            yield load
        finally:
            stop.set()
            load.answers += running.result().answers


def load_model(url: str) -> httpx.Response:
    return httpx.post(f"{url}/v2/repository/models/blobs/load", timeout=60)


def ask_version(url: str) -> int:
    answer = httpx.post(f"{url}/segment", content=PICTURE, timeout=60).raise_for_status()
    return int(answer.json()["version"])


def test_a_new_version_and_a_broken_one_lose_no_request(
    server: ServerProcess, repo: Path, report: Report
) -> None:
    with asked_all_the_time(server.url) as load:
        assert ask_version(server.url) == 1
        publish_graph(repo, "blobs", build_graph(), version=2)
        began_s = time.monotonic()
        assert load_model(server.url).status_code == 200
        report("swap_s", time.monotonic() - began_s)
        assert ask_version(server.url) == 2
        publish_graph(repo, "blobs", b"broken", version=3)
        refused = load_model(server.url)
        assert (refused.status_code, refused.json()["code"]) == (503, "model_unavailable")
        assert ask_version(server.url) == 2
        assert httpx.get(f"{server.url}/v2/health/ready").status_code == 200
    report("requests", len(load.answers))
    assert set(load.statuses) == {200}


@pytest.mark.slow
def test_a_file_that_is_cut_short_while_it_is_loaded_is_refused(
    server: ServerProcess, repo: Path, report: Report
) -> None:
    """The file changes under the server's hands: it is taken whole, or it is not taken."""
    stop = threading.Event()
    whole = build_graph()
    file = repo / "blobs" / "1" / "model.onnx"

    def write() -> None:
        while not stop.is_set():
            file.write_bytes(whole[: len(whole) // 2])
            time.sleep(0.002)
            file.write_bytes(whole)
            time.sleep(0.002)

    statuses = []
    with asked_all_the_time(server.url) as load, ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        for take in range(20):
            config = (repo / "blobs" / "config.json").read_text(encoding="utf-8")
            changed = config.replace("finds red", f"take {take} finds red")
            (repo / "blobs" / "config.json").write_text(changed, encoding="utf-8")
            statuses.append(load_model(server.url).status_code)
        stop.set()
        writing.result()
        assert load_model(server.url).status_code == 200
    report("refused_of_20", statuses.count(503))
    assert set(statuses) <= {200, 503}
    assert set(load.statuses) == {200}


@pytest.mark.slow
def test_twenty_reloads_do_not_grow(server: ServerProcess, repo: Path, report: Report) -> None:
    """The first ten fill the allocator's pools."""
    sizes = []
    for version in range(2, 32):
        publish_graph(repo, "blobs", build_graph(), version=version)
        assert load_model(server.url).status_code == 200
        assert ask_version(server.url) == version
        sizes.append(read_resident_bytes(server.process.pid))
    slope = float(np.polyfit(np.arange(20), sizes[10:], 1)[0])
    report("rss_mb", sizes[-1] / 1e6)
    report("slope_kb_per_reload", slope / 1e3)
    assert slope * 20 < 0.05 * sizes[10]
    assert 'version="31"' in str(read_metrics(server.url))
