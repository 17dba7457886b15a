from __future__ import annotations

import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from service.errors import StartupError
from service.http.accept import Accepter
from service.http.listeners import bind
from service.scale.workers import parent as parent_module
from service.scale.workers import process as process_module
from service.scale.workers.channel import MAIN, ParentEnd, State, WorkerEnd
from service.scale.workers.parent import Parent
from service.scale.workers.process import WorkerProcess
from service.settings import Settings
from tests.support.stand_in_worker import BREAKS, FAILS, STAYS, STOPS, stand_in
from tests.support.waiting import poll_until

WAIT_S = 30.0
SILENCE_S, TIMEOUT_S = 0.5, 60.0
"""Far above the time between two reports of a stand-in."""


class Running:
    """A parent in a thread, with stand-ins for its workers."""

    def __init__(self, folder: Path, workers: int = 2, **changes: Any) -> None:
        self.folder = folder
        self.listener = bind("127.0.0.1", 0, "a test")
        changes = {"worker_timeout_s": TIMEOUT_S, **changes}
        settings = Settings(workers=workers).model_copy(update=changes)
        self.parent = Parent(settings, {MAIN: self.listener}, partial(stand_in, folder))
        self.error: StartupError | None = None
        self.status: int | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.status = self.parent.run()
        except StartupError as error:
            self.error = error

    def connect(self) -> socket.socket:
        """A connection; waits until the parent listens."""
        deadline_s = time.monotonic() + WAIT_S
        while True:
            try:
                return socket.create_connection(self.listener.getsockname(), WAIT_S)
            except ConnectionRefusedError:  # nobody is ready
                assert time.monotonic() < deadline_s
                time.sleep(0.01)

    def ask(self) -> tuple[int, int]:
        """A worker's number and process, which keeps the connection."""
        with self.connect() as client:
            return read_answer(client)

    def ask_until_all(self) -> dict[int, int]:
        """The processes of all workers by their numbers."""
        found: dict[int, int] = {}
        count = self.parent._settings.workers
        deadline_s = time.monotonic() + WAIT_S
        while len(found) < count:
            index, process = self.ask()
            found[index] = process
            assert time.monotonic() < deadline_s
        return found

    def signal(self, number: int) -> None:
        self.parent.take_signal(number)

    def join(self) -> None:
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        self.listener.close()


def read_answer(client: socket.socket) -> tuple[int, int]:
    index, process = client.recv(100).split()
    return int(index), int(process)


def is_refused(running: Running) -> bool:
    with running.connect() as client:
        try:
            return client.recv(1) == b""
        except ConnectionResetError:
            return True


wait_for = partial(poll_until, timeout_s=WAIT_S, pause_s=0.01)


@contextmanager
def run_parent(folder: Path, workers: int = 2, **changes: Any) -> Iterator[Running]:
    running = Running(folder, workers, **changes)
    try:
        yield running
    finally:
        (folder / STAYS).unlink(missing_ok=True)
        running.signal(signal.SIGTERM)
        running.signal(signal.SIGTERM)
        running.join()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(parent_module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(parent_module, "TICK_S", 0.02)
    monkeypatch.setattr(process_module, "SILENCE_S", SILENCE_S)
    caplog.set_level("INFO")


def test_connections_go_to_the_worker_with_the_fewest_and_signals_to_all(tmp_path: Path) -> None:
    with run_parent(tmp_path) as running:
        asked = [running.ask()[0]]
        # What the second one had less when it came is made good first.
        while set(asked) != {0, 1} or abs(asked.count(0) - asked.count(1)) > 1:
            asked.append(running.ask()[0])
            assert len(asked) < 3000
            time.sleep(0.01)
        asked = [running.ask()[0] for _ in range(20)]
        assert abs(asked.count(0) - asked.count(1)) <= 2
        running.signal(signal.SIGTERM)
        running.join()
    assert [(tmp_path / f"{i}.signal").read_text() for i in (0, 1)] == [str(signal.SIGTERM)] * 2
    assert (running.error, running.status) == (None, 0)


def test_another_takes_the_place_of_a_worker_that_dies(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with run_parent(tmp_path, workers=1) as running:
        _, first = running.ask()
        (tmp_path / FAILS).touch()  # the next one cannot start, either
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: caplog.text.count("has died") >= 2)
        (tmp_path / FAILS).unlink()
        _, second = running.ask()
        assert second != first
    assert "worker 0 has died (exit status -9), another starts in 0.01 s" in caplog.text
    assert "worker 0 has died (exit status 3), another starts in 0.02 s" in caplog.text
    assert running.error is None


def test_a_stopped_worker_gets_no_connections_and_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with run_parent(tmp_path, worker_timeout_s=4.0) as running:
        processes = running.ask_until_all()
        (tmp_path / f"{STOPS}0").touch()
        wait_for(lambda: not (tmp_path / f"{STOPS}0").exists())
        time.sleep(2 * SILENCE_S)
        asked = [running.ask() for _ in range(20)]
        if "is killed" not in caplog.text:
            assert {index for index, _ in asked} == {1}
        wait_for(lambda: "worker 0 has not answered for 4 s, it is killed" in caplog.text)
        again = running.ask_until_all()
        assert again[0] != processes[0] and again[1] == processes[1]


def test_connections_that_a_worker_has_not_received_go_to_another(tmp_path: Path) -> None:
    with run_parent(tmp_path, workers=1) as running:
        _, first = running.ask()
        os.kill(first, signal.SIGSTOP)
        clients = [running.connect() for _ in range(5)]
        time.sleep(2 * SILENCE_S)  # some are in its channel, others in the system's queue
        os.kill(first, signal.SIGKILL)
        answers = {read_answer(client) for client in clients}
        assert len(answers) == 1 and (0, first) not in answers
        for client in clients:
            client.close()


def test_workers_are_not_killed_for_a_time_in_which_the_parent_did_not_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a laptop's suspension, or if the whole group of processes was stopped."""
    monkeypatch.setattr(parent_module, "STALL_S", 0.5)
    stall_s = [0.0]
    check = Parent._check

    def check_late(self: Parent) -> None:
        if stall_s[0]:
            time.sleep(stall_s[0])
            for worker in self._workers.values():  # nothing was heard meanwhile
                worker.channel.heard_s -= 10 * TIMEOUT_S
            stall_s[0] = 0.0
        check(self)

    monkeypatch.setattr(Parent, "_check", check_late)
    with run_parent(tmp_path) as running:
        processes = running.ask_until_all()
        stall_s[0] = 1.0
        wait_for(lambda: stall_s[0] == 0.0)
        assert running.ask_until_all() == processes
    assert "is killed" not in caplog.text


def test_a_worker_that_has_failed_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with run_parent(tmp_path) as running:
        processes = running.ask_until_all()
        (tmp_path / f"{BREAKS}1").touch()
        wait_for(lambda: (tmp_path / "1.signal").exists())
        (tmp_path / f"{BREAKS}1").unlink()
        wait_for(lambda: "worker 1 has died (exit status 0)" in caplog.text)
        again = running.ask_until_all()
        assert again[0] == processes[0] and again[1] != processes[1]
    assert "worker 1 has failed, it is replaced" in caplog.text


def test_workers_that_refuse_work_get_connections_last() -> None:
    def rank(state: State, connections: int) -> tuple[bool, int]:
        worker = WorkerProcess.__new__(WorkerProcess)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            worker.channel = ParentEnd(ours)
            WorkerEnd(theirs).report(connections, state)
            worker.channel.read()
        return worker.rank

    refuses, busy, idle = rank(State.REFUSES, 0), rank(State.SERVES, 9), rank(State.SERVES, 1)
    assert sorted([refuses, busy, idle]) == [idle, busy, refuses]


def test_workers_that_do_not_drain_are_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parent_module, "END_S", 0.5)
    (tmp_path / STAYS).touch()
    with run_parent(tmp_path, drain_timeout_s=0.5) as running:
        running.ask_until_all()
        running.signal(signal.SIGTERM)
        running.join()
    assert running.status == 1
    assert caplog.text.count("has not ended in time, it is killed") == 2


def test_a_second_signal_ends_all_at_once(tmp_path: Path) -> None:
    (tmp_path / STAYS).touch()
    with run_parent(tmp_path, drain_timeout_s=600.0) as running:
        running.ask_until_all()
        running.signal(signal.SIGTERM)
        wait_for(lambda: len(list(tmp_path.glob("*.signal"))) == 2)
        running.ask()  # draining workers still answer
        running.signal(signal.SIGINT)
        running.join()
    assert running.status == 128 + signal.SIGINT


def test_a_signal_to_reload_is_passed_on_and_ends_nothing(tmp_path: Path) -> None:
    with run_parent(tmp_path) as running:
        running.signal(signal.SIGHUP)  # those that start get it later
        processes = running.ask_until_all()
        wait_for(lambda: len(list(tmp_path.glob("*.signal"))) == 2)
        assert {f.read_text() for f in tmp_path.glob("*.signal")} == {str(signal.SIGHUP)}
        assert running.ask_until_all() == processes


def test_without_descriptors_connections_are_refused_and_later_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parent_module, "PAUSE_S", 0.2)
    accept, calls, fails = Accepter.accept, [0], [False]

    def fail(self: Accepter) -> Iterator[socket.socket]:
        calls[0] += 1
        if fails[0]:
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(self)

    monkeypatch.setattr(Accepter, "accept", fail)
    with run_parent(tmp_path) as running:
        running.ask_until_all()
        fails[0], before = True, calls[0]
        wait_for(lambda: is_refused(running))  # a call that began before may accept the first
        wait_for(lambda: "connections are refused" in caplog.text)
        for _ in range(20):
            running.connect().close()
            time.sleep(0.05)
        assert calls[0] - before <= 10  # not as often as there are connections
        fails[0] = False
        wait_for(lambda: not is_refused(running))  # a call that failed before may refuse the first
        running.ask_until_all()
    assert caplog.text.count("connections are refused: [Errno 24] Too many open files") == 1


def test_a_worker_that_cannot_be_started_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run_parent(tmp_path) as running:
        processes = running.ask_until_all()
        fails = [True]

        def start(*arguments: Any) -> WorkerProcess:
            if fails.pop(0) if fails else False:
                raise OSError(errno.EAGAIN, "no process left")
            return WorkerProcess(*arguments)

        monkeypatch.setattr(parent_module, "WorkerProcess", start)
        os.kill(processes[0], signal.SIGKILL)
        wait_for(lambda: "worker 0 cannot be started" in caplog.text)
        assert running.ask_until_all()[0] != processes[0]


def test_workers_that_cannot_start_end_the_start(tmp_path: Path) -> None:
    (tmp_path / FAILS).touch()
    running = Running(tmp_path)
    running.join()
    assert str(running.error).startswith("worker ") and "exit status 3" in str(running.error)


def test_a_signal_before_anybody_is_ready_ends_the_start(tmp_path: Path) -> None:
    with run_parent(tmp_path) as running:
        pass
    assert running.error is None
    assert not list(tmp_path.glob("*.signal"))
