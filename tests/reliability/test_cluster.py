"""A Ray cluster of two nodes on this machine: a node dies, an upgrade, more work than one does."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton

from benchmarks.load import Load, read_metrics, run_closed_loop
from service.scale.cluster.settings import ClusterSettings
from tests.reliability.conftest import Report
from tests.support.blob_model import draw_picture, encode_picture
from tests.support.processes import free_port
from tests.support.ray_nodes import add_node, run_cluster, skip_without_ray
from tests.support.server import run_server
from tests.support.slow_model import ONE_CANVAS, build_slow_graph, publish_graph
from tests.support.waiting import poll_until

pytestmark = pytest.mark.slow
PICTURE = encode_picture(draw_picture())
CLIENTS = 8
WAIT_S = 240.0


@pytest.fixture(scope="module")
def head() -> Iterator[Any]:
    """A cluster of one node with one CPU, so one worker; tests add another node."""
    skip_without_ray()
    with run_cluster() as cluster:
        import ray
        from ray import serve

        add_node(cluster)
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


@contextmanager
def second_node(head: Any) -> Iterator[Any]:
    node = add_node(head)
    try:
        yield node
    finally:
        if node in head.list_all_nodes():
            head.remove_node(node)


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Version 1 of a slow model, and version 2."""
    root = tmp_path_factory.mktemp("repos")
    graph = build_slow_graph(rounds=4000)
    for version in (1, 2):
        publish_graph(root / str(version), "blobs", graph, version, input=ONE_CANVAS)
    return root / "1", root / "2"


@pytest.fixture(scope="module")
def port() -> int:
    """Serve's, which is started once."""
    return free_port()


def deploy(port: int, repo: Path, **changes: Any) -> str:
    from service.scale.cluster import app

    app.start(ClusterSettings(model_repo=repo, port=port, **changes), proxy_location="HeadOnly")
    return f"http://127.0.0.1:{port}"


@contextmanager
def under_load(url: str) -> Iterator[Load]:
    """Clients that each wait for their answer; when this ends, all answers are in the load."""
    load, stop = Load(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        work = run_closed_loop(
            url, [PICTURE], clients=CLIENTS, may_go_on=lambda _: not stop.is_set()
        )
        running = pool.submit(asyncio.run, work)
        try:
            yield load
        finally:
            stop.set()
            load.answers += running.result().answers


wait_until = partial(poll_until, timeout_s=WAIT_S, pause_s=0.2)


def find_workers(url: str) -> set[int]:
    """Process ids of the workers that serve, by the metrics."""
    names = (name for name in read_metrics(url) if name.startswith("solo_model_info"))
    return {int(name.partition('replica="')[2].partition('"')[0].split(":")[1]) for name in names}


def count(url: str, family: str) -> float:
    return sum(v for name, v in read_metrics(url).items() if name.partition("{")[0] == family)


def test_a_node_that_dies_under_load_loses_no_request(
    head: Any, port: int, repos: tuple[Path, Path], report: Report
) -> None:
    scaling = {"max_replicas": 2, "target_requests": 1, "upscale_delay_s": 0}
    url = deploy(port, repos[0], downscale_delay_s=600, **scaling)
    (first,) = find_workers(url)
    with second_node(head) as node, under_load(url) as load:
        wait_until(lambda: len(find_workers(url)) == 2)
        (second,) = find_workers(url) - {first}
        time.sleep(1)  # so that it has calls in work
        # As when a machine loses its power: the node and what runs on it at once.
        head.remove_node(node, allow_graceful=False)
        os.kill(second, signal.SIGKILL)
        wait_until(lambda: count(url, "solo_cluster_retries_total") > 0)
        answered = count(url, "solo_images_total")
        wait_until(lambda: count(url, "solo_images_total") > answered + 3 * CLIENTS)
        retries = count(url, "solo_cluster_retries_total")
    report("requests", len(load.answers))
    report("failed", len(load.answers) - load.statuses[200])
    report("sent_to_another_worker", retries)
    assert set(load.statuses) == {200}


def test_an_upgrade_under_load_fails_no_request(
    head: Any, port: int, repos: tuple[Path, Path], report: Report
) -> None:
    with second_node(head):
        url = deploy(port, repos[0])
        old = find_workers(url)
        with under_load(url) as load:
            deploy(port, repos[1])
            wait_until(lambda: not old & find_workers(url))
        report("requests", len(load.answers))
        report("failed", len(load.answers) - load.statuses[200])
        assert set(load.statuses) == {200}
        assert httpx.post(f"{url}/segment", content=PICTURE).json()["version"] == 2


def test_an_upgrade_under_grpc_load_fails_no_request(
    head: Any, port: int, repos: tuple[Path, Path], report: Report
) -> None:
    """Old and new fronts listen on the port together for a time."""
    grpc_port, stop = free_port(), threading.Event()
    image = triton.InferInput("image", [1], "BYTES")
    image.set_data_from_numpy(np.array([PICTURE, None], np.object_)[:-1])
    versions: list[str] = []

    def send() -> None:
        while not stop.is_set():
            with triton.InferenceServerClient(f"127.0.0.1:{grpc_port}") as client:
                for _ in range(3):
                    answer = client.infer("blobs", [image], client_timeout=120)
                    versions.append(answer.get_response().model_version)

    with second_node(head), ThreadPoolExecutor(2) as pool:
        deploy(port, repos[0], grpc_port=grpc_port)
        running = [pool.submit(send) for _ in range(2)]
        try:
            wait_until(lambda: len(versions) > 4)
            deploy(port, repos[1], grpc_port=grpc_port)
            wait_until(lambda: versions[-4:] == ["2"] * 4)
        finally:
            stop.set()
        for sending in running:
            sending.result()
    report("requests", len(versions))
    assert set(versions) == {"1", "2"}


def test_workers_follow_the_load(
    head: Any, port: int, repos: tuple[Path, Path], report: Report
) -> None:
    scaling = {"max_replicas": 2, "target_requests": 2, "upscale_delay_s": 1}
    with second_node(head):
        url = deploy(port, repos[0], downscale_delay_s=2, **scaling)
        assert len(find_workers(url)) == 1
        began_s = time.monotonic()
        with under_load(url) as load:
            wait_until(lambda: len(find_workers(url)) == 2)
            report("second_worker_after_s", time.monotonic() - began_s)
        assert set(load.statuses) == {200}
        wait_until(lambda: len(find_workers(url)) == 1)


def test_sigterm_finishes_what_was_accepted(repos: tuple[Path, Path], tmp_path: Path) -> None:
    """Most of it waits at the front for the worker, which takes two requests at once."""
    skip_without_ray()
    flags = ("--model-repo", str(repos[0]), "--max-requests", "2")
    with run_server(tmp_path / "log", *flags, on_ray=True) as server, ThreadPoolExecutor(1) as pool:
        work = run_closed_loop(server.url, [PICTURE], clients=32, may_go_on=lambda sent: sent < 32)
        running = pool.submit(asyncio.run, work)
        wait_until(lambda: count_accepted(server.url) == 32)
        server.terminate()
        assert running.result().statuses == {200: 32}
        assert server.wait() == 0, server.read_log()


def count_accepted(url: str) -> float:
    """Images in work or done."""
    return count(url, "solo_queue_images") + count(url, "solo_images_total")
