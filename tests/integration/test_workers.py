"""The real server with two workers on one port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx
import pytest

from benchmarks.load import read_metrics
from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.server import ServerProcess, run_server
from tests.support.waiting import poll_until

PICTURE = encode_picture(draw_picture())
WAIT_S = 60.0
IMAGES = 'solo_images_total{model="blobs",replica="%d",version="1"}'
MEMORY = 'process_resident_memory_bytes{replica="%d"}'


def build_flags(repo: Path, *more: str) -> tuple[str, ...]:
    return ("--model-repo", str(repo), "--device", "cpu", "--workers", "2", *more)


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repo")
    publish(root)
    return root


@pytest.fixture
def server(repo: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    with run_server(tmp_path / "log", *build_flags(repo, "--threads", "1")) as running:
        wait_for(lambda: has_both(running.url))
        yield running


wait_for = partial(poll_until, timeout_s=WAIT_S, pause_s=0.05)


def has_both(url: str) -> bool:
    metrics = read_metrics(url)
    return all(MEMORY % index in metrics for index in (0, 1))


def find_workers(server: ServerProcess) -> list[int]:
    """The processes of the workers, by their numbers' order."""
    listed = subprocess.run(
        ["ps", "-ww", "--ppid", str(server.process.pid), "-o", "pid=", "-o", "args="],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "spawn_main" in line]


def segment(client: httpx.Client) -> int:
    return client.post("/segment", content=PICTURE).status_code


def test_workers_share_the_connections_and_any_of_them_tells_the_metrics_of_all(
    server: ServerProcess,
) -> None:
    before = read_metrics(server.url)
    clients = [httpx.Client(base_url=server.url, timeout=WAIT_S) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert set(pool.map(segment, clients)) == {200}
    for client in clients[:4]:
        metrics = client.get("/metrics")
        assert metrics.text.count("# TYPE solo_images_total counter") == 1
        counts = [read_metrics(server.url)[IMAGES % i] - before[IMAGES % i] for i in (0, 1)]
        assert sum(counts) == 40
        assert min(counts) >= 15  # 20, if the connections of before are forgotten everywhere
    for client in clients:
        client.close()


def test_a_worker_that_dies_is_replaced_while_the_other_serves(server: ServerProcess) -> None:
    first = find_workers(server)
    assert len(first) == 2
    os.kill(first[0], signal.SIGKILL)
    answers = []
    for _ in range(10):
        # A connection that the dead worker had accepted is lost.
        with (
            suppress(httpx.TransportError),
            httpx.Client(base_url=server.url, timeout=WAIT_S) as client,
        ):
            answers.append(segment(client))
    assert set(answers) == {200}
    wait_for(lambda: "has died (exit status -9)" in server.read_log())
    wait_for(lambda: len(find_workers(server)) == 2 and has_both(server.url))
    assert first[1] in find_workers(server)
    server.terminate()
    assert server.wait() == 0


def test_sigterm_finishes_what_was_accepted_everywhere(repo: Path, tmp_path: Path) -> None:
    # A lone canvas waits that long: time for a signal while its request is in work.
    flags = build_flags(repo, "--max-delay-ms", "3000", "--admin-port", "0")
    with run_server(tmp_path / "log", *flags) as server, ThreadPoolExecutor(4) as pool:
        (admin,) = re.findall(r"admin endpoints on (http://\S+)", server.read_log())
        wait_for(lambda: has_both(admin))
        assert httpx.get(f"{server.url}/metrics").status_code == 404
        clients = [httpx.Client(base_url=server.url, timeout=WAIT_S) for _ in range(4)]
        accepted = [pool.submit(segment, client) for client in clients]
        queue = 'solo_queue_images{replica="%d"}'

        def is_accepted() -> bool:
            metrics = read_metrics(admin)
            return [metrics[queue % index] for index in (0, 1)] == [2.0, 2.0]

        wait_for(is_accepted)
        server.terminate()
        wait_for(lambda: httpx.get(f"{server.url}/v2/health/ready").status_code == 503)
        assert [answer.result() for answer in accepted] == [200] * 4
        assert server.wait() == 0
        assert "Traceback" not in server.read_log()
        for client in clients:
            client.close()


def test_workers_end_if_the_parent_is_killed(server: ServerProcess) -> None:
    workers = find_workers(server)
    assert len(workers) == 2
    server.process.kill()
    server.wait()

    def have_ended() -> bool:
        return not any(Path(f"/proc/{process}/stat").exists() for process in workers)

    wait_for(have_ended)


@pytest.mark.parametrize("broken", ["port", "models"])
def test_what_cannot_be_served_stops_the_start_with_the_reason(
    repo: Path, tmp_path: Path, broken: str
) -> None:
    with run_server(tmp_path / "first.log", "--model-repo", str(repo), "--device", "cpu") as first:
        port = first.url.rpartition(":")[2]
        flags = build_flags(repo) if broken == "port" else build_flags(tmp_path / "nowhere")
        more = ("--port", port) if broken == "port" else ()
        server = ServerProcess(tmp_path / "log", *flags, *more)
        assert server.wait() == 1
    reason = "in use" if broken == "port" else "nowhere"
    assert re.search(rf"solo-serve: error: .*{reason}", server.read_log())
    assert "Traceback" not in server.read_log()
