from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from service.errors import StartupError
from service.http.servers import bind
from service.scale.workers import parent as parent_module
from service.scale.workers.channel import MAIN, WorkerEnd
from service.scale.workers.parent import Parent, share
from service.settings import Settings
from tests.support.waiting import poll_until

WAIT_S = 30.0
FAILS = "fails"


def stand_in(settings: Settings, index: int, channel: socket.socket, folder: Path) -> None:
    """A worker that tells each client who it is, and counts the connections it keeps."""
    if (folder / FAILS).exists():
        sys.exit(3)
    end = WorkerEnd(channel)
    kept: list[socket.socket] = []
    end.report(0)
    while True:
        for number, connection in end.receive():
            if connection is None:
                (folder / f"{index}.signal").write_text(str(number))
                sys.exit(0)
            kept.append(connection)
            connection.sendall(b"%d %d" % (index, os.getpid()))


class Running:
    """A parent in a thread, with stand-ins for its workers."""

    def __init__(self, folder: Path, workers: int = 2) -> None:
        self.listener = bind("127.0.0.1", 0, "a test")
        settings = Settings(workers=workers)
        self.parent = Parent(settings, {MAIN: self.listener}, folder, stand_in)
        self.error: StartupError | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.parent.run()
        except StartupError as error:
            self.error = error

    def ask(self) -> tuple[int, int]:
        """A worker's number and process, which keeps the connection."""
        deadline_s = time.monotonic() + WAIT_S
        while True:
            with socket.socket() as client:
                client.settimeout(WAIT_S)
                try:
                    client.connect(self.listener.getsockname())
                except ConnectionRefusedError:  # nobody is ready
                    assert time.monotonic() < deadline_s
                    time.sleep(0.01)
                    continue
                if answer := client.recv(100):
                    index, process = answer.split()
                    return int(index), int(process)

    def end(self) -> None:
        self.parent.handle_signal(signal.SIGTERM)
        self.parent.woken.send(b"x")
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        self.listener.close()


wait_for = partial(poll_until, timeout_s=WAIT_S, pause_s=0.01)


def test_connections_go_to_the_worker_with_the_fewest_and_signals_to_all(tmp_path: Path) -> None:
    running = Running(tmp_path)
    try:
        asked = [running.ask()[0]]
        # What the second one had less when it came is made good first.
        while set(asked) != {0, 1} or abs(asked.count(0) - asked.count(1)) > 1:
            asked.append(running.ask()[0])
            assert len(asked) < 3000
            time.sleep(0.01)
        asked = [running.ask()[0] for _ in range(20)]
        assert abs(asked.count(0) - asked.count(1)) <= 2
    finally:
        running.end()
    assert [(tmp_path / f"{i}.signal").read_text() for i in (0, 1)] == [str(signal.SIGTERM)] * 2
    assert running.error is None


def test_another_takes_the_place_of_a_worker_that_dies(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parent_module, "FIRST_PAUSE_S", 0.01)
    running = Running(tmp_path, workers=1)
    try:
        _, first = running.ask()
        (tmp_path / FAILS).touch()  # the next one cannot start, either
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: caplog.text.count("has died") >= 2)
        (tmp_path / FAILS).unlink()
        _, second = running.ask()
        assert second != first
    finally:
        running.end()
    assert "worker 0 has died (exit status -9), another starts in 0.01 s" in caplog.text
    assert "worker 0 has died (exit status 3), another starts in 0.02 s" in caplog.text
    assert running.error is None


def test_workers_that_cannot_start_end_the_start(tmp_path: Path) -> None:
    (tmp_path / FAILS).touch()
    running = Running(tmp_path)
    running.thread.join(WAIT_S)
    assert str(running.error).startswith("worker ") and "exit status 3" in str(running.error)
    running.listener.close()


def test_a_signal_before_anybody_is_ready_ends_the_start(tmp_path: Path) -> None:
    running = Running(tmp_path)
    running.end()
    assert running.error is None
    assert not list(tmp_path.glob("*.signal"))


def test_what_workers_share() -> None:
    settings = Settings(
        workers=3,
        max_queue_canvases=100,
        max_image_canvases=17,
        max_decoded_pixels=1000,
        max_connections=1000,
        threads=5,
    )
    shared = share(settings)
    assert (shared.max_queue_canvases, shared.max_connections) == (34, 334)
    assert shared.max_decoded_pixels == 334
    assert shared.threads == 5  # as told
    large = share(Settings(workers=3, max_queue_canvases=100, max_image_canvases=50))
    assert large.max_queue_canvases == 100  # the largest image must be admitted


@pytest.mark.parametrize(
    ("cores", "workers", "pool_threads", "threads"),
    [(2, 2, 1, 2), (16, 16, 1, 2), (16, 4, 4, 8), (16, 2, 8, 16), (1, 2, 1, 1)],
)
def test_threads_that_nobody_has_set_follow_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, workers: int, pool_threads: int, threads: int
) -> None:
    monkeypatch.setattr(parent_module, "count_cores", lambda: cores)
    shared = share(Settings(workers=workers))
    assert (shared.pool_threads, shared.threads) == (pool_threads, threads)
