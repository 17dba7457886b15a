"""Life and death of the server's processes: signals, hanging workers, lack of resources."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import httpx
import pytest

from benchmarks.load import read_metrics
from service.http.signals import EXIT_FAILED
from tests.support.blob_model import draw_picture, encode_picture, poisoned_picture, publish
from tests.support.processes import free_port
from tests.support.server import CPU_FLAGS, ServerProcess, run_server
from tests.support.waiting import poll_until

PICTURE = encode_picture(draw_picture())
WAIT_S = 60.0
BOTH = [1, pytest.param(2, marks=pytest.mark.slow)]
END_S = 30.0
"""Far above the times after which processes are killed here."""
READY = 'solo_ready{replica="%d"}'
wait_for = partial(poll_until, timeout_s=WAIT_S, pause_s=0.05)


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repo")
    publish(root, poisonable=True)
    return root


def build_flags(repo: Path, workers: int, *more: str) -> tuple[str, ...]:
    return ("--model-repo", str(repo), *CPU_FLAGS, "--workers", str(workers), *more)


def has_all(url: str, workers: int) -> bool:
    if workers == 1:
        return read_metrics(url)["solo_ready"] == 1.0
    metrics = read_metrics(url)
    return all(metrics.get(READY % index) == 1.0 for index in range(workers))


def find_children(server: ServerProcess) -> list[int]:
    listed = subprocess.run(
        ["ps", "-ww", "--ppid", str(server.process.pid), "-o", "pid=", "-o", "args="],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "spawn_main" in line]


def segment(url: str, picture: bytes = PICTURE) -> int:
    """The status; 0 for a connection that was lost."""
    with suppress(httpx.TransportError):
        return httpx.post(f"{url}/segment", content=picture, timeout=WAIT_S).status_code
    return 0


@contextmanager
def run_workers(repo: Path, folder: Path, *more: str, workers: int = 2) -> Iterator[ServerProcess]:
    with run_server(folder / "log", *build_flags(repo, workers, *more)) as server:
        wait_for(lambda: has_all(server.url, workers))
        yield server


def test_a_stopped_worker_gets_no_connections_and_is_replaced(repo: Path, tmp_path: Path) -> None:
    with run_workers(repo, tmp_path, "--worker-timeout-s", "4") as server:
        children = find_children(server)
        assert len(children) == 2
        os.kill(children[0], signal.SIGSTOP)
        time.sleep(1.5)  # it may still get some before it is known to be silent
        assert [segment(server.url) for _ in range(10)] == [200] * 10
        wait_for(lambda: "has not answered for 4 s, it is killed" in server.read_log())
        wait_for(lambda: has_all(server.url, 2))
        assert children[1] in find_children(server)
        server.terminate()
        assert server.wait(END_S) == 0


def test_a_drain_ends_with_a_worker_that_does_not(repo: Path, tmp_path: Path) -> None:
    flags = ("--worker-timeout-s", "600", "--drain-timeout-s", "1")
    with run_workers(repo, tmp_path, *flags) as server:
        os.kill(find_children(server)[0], signal.SIGSTOP)
        server.terminate()
        assert server.wait(END_S) == 1
        assert "has not ended in time, it is killed" in server.read_log()
        assert server.read_log().count("draining") == 1  # the other one did


@pytest.mark.parametrize("workers", BOTH)
def test_a_second_signal_ends_the_server_at_once(repo: Path, tmp_path: Path, workers: int) -> None:
    flags = ("--max-delay-ms", "10000", "--drain-timeout-s", "600")
    with run_workers(repo, tmp_path, *flags, workers=workers) as server:
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
            head = f"POST /segment HTTP/1.1\r\nhost: x\r\ncontent-length: {len(PICTURE)}\r\n\r\n"
            client.sendall(head.encode() + PICTURE)  # a lone canvas waits for others
            wait_for(lambda: count(server.url, "solo_queue_images") == 1.0)
            server.terminate()
            wait_for(lambda: "draining" in server.read_log())
            server.process.send_signal(signal.SIGINT)
            assert server.wait(END_S) == 128 + signal.SIGINT
        assert "Traceback" not in server.read_log()


def count(url: str, name: str) -> float:
    """A metric's sum over the workers."""
    return sum(value for key, value in read_metrics(url).items() if key.startswith(name))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_hangup_reloads(tmp_path: Path, workers: int) -> None:
    publish(tmp_path / "repo")
    with run_workers(tmp_path / "repo", tmp_path, workers=workers) as server:
        publish(tmp_path / "repo", "late")
        for _ in range(20):
            server.process.send_signal(signal.SIGHUP)
        info = 'solo_model_info{backend="onnxruntime",device="cpu",model="late"'
        wait_for(lambda: count(server.url, info) == workers)
        before = server.read_log().count("has changed")
        checked = "the model repository has been checked for changes"
        checks = server.read_log().count(checked)
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: server.read_log().count(checked) >= checks + workers)
        assert server.read_log().count("has changed") == before
        late = httpx.post(f"{server.url}/segment?model=late", content=PICTURE, timeout=WAIT_S)
        assert late.status_code == 200
        server.process.send_signal(signal.SIGQUIT)
        assert server.wait(END_S) == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_out_of_descriptors_connections_are_refused_and_later_served(
    repo: Path, tmp_path: Path, workers: int
) -> None:
    limit = 100

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    flags = build_flags(repo, workers)
    with run_server(tmp_path / "log", *flags, prepare=limit_files) as server:
        wait_for(lambda: has_all(server.url, workers))
        port = int(server.url.rpartition(":")[2])
        clients = [socket.create_connection(("127.0.0.1", port), WAIT_S) for _ in range(3 * limit)]
        wait_for(lambda: "refused" in server.read_log())
        used_s = cpu_seconds(server.process.pid)
        time.sleep(2)
        assert cpu_seconds(server.process.pid) - used_s < 1  # it does not try without a pause
        for client in clients:
            client.close()
        wait_for(lambda: segment(server.url) == 200)
        assert [segment(server.url) for _ in range(10)] == [200] * 10
        log = server.read_log()
        assert 1 <= log.count("refused") <= 3 and "draining" not in log and "Traceback" not in log
        assert "has died" not in log
        server.terminate()
        assert server.wait(END_S) == 0


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    "folder",
    ["long", pytest.param("missing", marks=pytest.mark.slow), "empty"],
)
def test_no_temporary_folder_is_needed_and_nothing_is_left_in_one(
    repo: Path, tmp_path: Path, folder: str
) -> None:
    temporary = tmp_path / ("x" * 200 if folder == "long" else folder)
    if folder != "missing":
        temporary.mkdir()
    environment = {"TMPDIR": str(temporary)}
    with run_server(tmp_path / "log", *build_flags(repo, 2), environment=environment) as server:
        wait_for(lambda: has_all(server.url, 2))
        assert segment(server.url) == 200
        children = find_children(server)
        server.process.kill()
        server.wait()
        wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
    assert not temporary.exists() or not list(temporary.iterdir())


@pytest.mark.parametrize("output", ["closed", "full", "gone"])
@pytest.mark.parametrize("workers", BOTH)
def test_the_server_needs_no_reader_of_its_log(
    repo: Path, tmp_path: Path, output: str, workers: int
) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    if output == "full":
        with suppress(BlockingIOError):
            while True:
                os.write(writer, b"x")
    os.set_blocking(writer, True)

    def replace_output() -> None:
        for descriptor in (1, 2):
            if output == "closed":
                os.close(descriptor)
            else:
                os.dup2(writer, descriptor)

    port = free_port()
    flags = build_flags(repo, workers, "--port", str(port))
    server = ServerProcess(tmp_path / "log", *flags, prepare=replace_output)
    url = f"http://127.0.0.1:{port}"
    try:
        if output == "gone":
            os.close(reader)
        os.close(writer)
        wait_for(lambda: answers(partial(has_all, url, workers)))
        assert [segment(url) for _ in range(20)] == [200] * 20
        server.terminate()
        assert server.wait(END_S) == 0
    finally:
        server.process.kill()
        server.wait()
        if output != "gone":
            os.close(reader)


def answers(condition: Callable[[], bool]) -> bool:
    with suppress(httpx.TransportError, OSError):
        return condition()
    return False


def test_a_process_whose_engines_cannot_be_replaced_ends(repo: Path, tmp_path: Path) -> None:
    module = "tests.support.broken_engines"
    flags = build_flags(repo, 1, "--max-rebuilds", "2")
    with run_server(tmp_path / "log", *flags, module=module) as server:
        assert segment(server.url, encode_picture(poisoned_picture())) in (0, 500)
        assert server.wait(END_S) == EXIT_FAILED
        log = server.read_log()
        assert "solo-serve: error: the engine of model 'blobs' has failed: 2 attempts" in log
        assert "CUDA error 700" in log and "Traceback" not in log


def test_a_worker_whose_engines_cannot_be_replaced_is_replaced(repo: Path, tmp_path: Path) -> None:
    module = "tests.support.broken_engines"
    flags = build_flags(repo, 2, "--max-rebuilds", "2")
    with run_server(tmp_path / "log", *flags, module=module) as server:
        wait_for(lambda: has_all(server.url, 2))
        children = find_children(server)
        assert segment(server.url, encode_picture(poisoned_picture())) in (0, 500)
        assert [segment(server.url) for _ in range(10)] == [200] * 10  # of the other one
        wait_for(lambda: f"has died (exit status {EXIT_FAILED})" in server.read_log())
        wait_for(lambda: has_all(server.url, 2))
        assert len(set(children) & set(find_children(server))) == 1
        server.terminate()
        assert server.wait(END_S) == 0
