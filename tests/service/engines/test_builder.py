"""The child process that builds an engine, with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from service.engines import builder
from service.engines.base import Backend, BackendError
from service.engines.builder import NICENESS, BuildFailed, Report, Upgrade
from tests.support.waiting import poll_until

TIMEOUT_S = 60.0

wait_for = partial(poll_until, timeout_s=TIMEOUT_S, pause_s=0.005)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def is_gone(pid: int) -> bool:
    return not is_running(pid)


def read_pids(file: Path) -> list[int]:
    wait_for(lambda: file.exists() and file.read_text().endswith("."))
    return [int(pid) for pid in file.read_text().removesuffix(".").split()]


# What the child runs. Each is pickled by its name.


def write_niceness(file: Path, report: Report) -> None:
    file.write_text(f"{os.nice(0)} {os.getpid() == os.getsid(0)}")


def report_steps(report: Report) -> None:
    print("a library prints something", flush=True)
    os.write(1, b"{\n")
    report("reading the graph", 0.0)
    time.sleep(1.5 * builder.REPORT_S)
    report("tactics", 0.25)
    for _ in range(200):
        report("too many to be told of", 0.5)
    report("beyond", 7.0)


def print_garbage(report: Report) -> None:
    print('{"done": true}\n[1, 2]\nnull\n{', flush=True)
    os._exit(0)


def fail_to_build(report: Report) -> None:
    raise BackendError("node conv_1 (Conv): no")


def break_down(report: Report) -> None:
    raise ValueError("broken")


def crash(report: Report) -> None:
    os.write(2, b"[TRT] an assertion in C++ failed\n\n")
    os.kill(os.getpid(), signal.SIGSEGV)


def exit_with_3(report: Report) -> None:
    raise SystemExit(3)


def sleep(pids: Path, report: Report) -> None:
    """Starts a process of its own, and then does not end."""
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    child = subprocess.Popen(command)
    pids.write_text(f"{os.getpid()} {child.pid}.")
    time.sleep(600)


def wait_for_long(report: Report) -> None:
    time.sleep(600)


def send_done_and_fail(report: Report) -> None:
    import atexit

    atexit.register(os._exit, 3)


class Loaded:
    """In the place of a backend, which only `load` gives."""


def plan(job: Callable[..., None], *arguments: Any) -> tuple[Upgrade, Any]:
    loaded: Any = Loaded()
    return Upgrade(partial(job, *arguments), lambda: loaded), loaded


def build(job: Callable[..., None], *arguments: Any) -> list[tuple[str, float]]:
    told: list[tuple[str, float]] = []
    plan(job, *arguments)[0].build(lambda status, progress: told.append((status, progress)))
    return told


class Building:
    """A build that runs in a thread."""

    def __init__(self, job: Callable[..., None], *arguments: Any) -> None:
        self.upgrade, _ = plan(job, *arguments)
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.upgrade.build(lambda status, progress: None)
        except Exception as error:
            self.error = error

    def has_started(self) -> bool:
        return self.upgrade._process is not None

    def wait(self) -> str:
        """Why it failed."""
        self.thread.join(TIMEOUT_S)
        assert not self.thread.is_alive()
        assert isinstance(self.error, BuildFailed)
        return str(self.error)


def test_the_job_runs_at_low_priority_in_a_session_of_its_own(tmp_path: Path) -> None:
    build(write_niceness, tmp_path / "file")
    expected = min(19, os.nice(0) + NICENESS)
    assert (tmp_path / "file").read_text() == f"{expected} True"


def test_progress_is_told_of_but_not_every_step_and_no_prints() -> None:
    told = build(report_steps)
    assert told[:2] == [("reading the graph", 0.0), ("tactics", 0.25)]
    assert told[-1] == ("beyond", 1.0)
    assert 3 <= len(told) < 10


def test_the_engine_is_what_load_gives() -> None:
    upgrade, loaded = plan(report_steps)
    upgrade.build(lambda status, progress: None)
    assert upgrade.load() is loaded


def test_an_engine_that_does_not_load_raises_the_reason() -> None:
    def load() -> Backend:
        raise BackendError("the plan is refused")

    with pytest.raises(BackendError, match="the plan is refused"):
        Upgrade(report_steps, load).load()


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (fail_to_build, r"^node conv_1 \(Conv\): no$"),
        (break_down, "^the builder ended with status 1 and no engine: ValueError: broken$"),
        (exit_with_3, "^the builder ended with status 3 and no engine$"),
        (send_done_and_fail, "^the builder ended with status 3 and no engine$"),
        (crash, r"^the builder was ended by SIGSEGV: \[TRT\] an assertion in C\+\+ failed$"),
        (print_garbage, r"^the builder ended with status 0 and no engine: \{$"),
    ],
)
def test_a_failed_build_says_why(job: Callable[..., None], reason: str) -> None:
    with pytest.raises(BuildFailed, match=reason):
        build(job)


def test_a_builder_that_is_killed_is_told_of(tmp_path: Path) -> None:
    building = Building(sleep, tmp_path / "pids")
    pid, grandchild = read_pids(tmp_path / "pids")
    os.kill(pid, signal.SIGKILL)
    assert building.wait() == "the builder was ended by SIGKILL"
    os.kill(grandchild, signal.SIGKILL)


def test_a_job_that_cannot_be_sent_is_told_of() -> None:
    with pytest.raises(BuildFailed, match=r"the builder cannot be started: .*pickle"):
        Upgrade(lambda report: None, lambda: pytest.fail("not loaded")).build(lambda *told: None)


def test_a_builder_that_cannot_be_started_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.spawn._python_exe", b"/nowhere/python")
    with pytest.raises(BuildFailed, match=r"ended with status|cannot be started"):
        build(report_steps)


def test_cancel_ends_the_builder_and_all_that_it_started(tmp_path: Path) -> None:
    building = Building(sleep, tmp_path / "pids")
    pids = read_pids(tmp_path / "pids")
    assert all(is_running(pid) for pid in pids)
    building.upgrade.cancel()
    assert building.wait() == "the build was cancelled"
    for pid in pids:
        wait_for(partial(is_gone, pid))
    building.upgrade.cancel()


def test_cancel_before_the_child_leads_a_session_ends_it_too() -> None:
    for pause_s in (0.0, 0.01, 0.05):
        building = Building(wait_for_long)
        wait_for(building.has_started)
        time.sleep(pause_s)
        building.upgrade.cancel()
        assert building.wait() == "the build was cancelled"


def test_a_build_that_was_cancelled_before_does_not_begin(tmp_path: Path) -> None:
    upgrade, _ = plan(write_niceness, tmp_path / "file")
    upgrade.cancel()
    with pytest.raises(BuildFailed, match="the build was cancelled"):
        upgrade.build(lambda status, progress: None)
    assert not (tmp_path / "file").exists()


def test_cancel_signals_no_builder_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number may be another process's by then."""
    upgrade, _ = plan(report_steps)
    upgrade.build(lambda status, progress: None)
    signalled: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda group, number: signalled.append(group))
    monkeypatch.setattr(os, "kill", lambda pid, number: signalled.append(pid))
    upgrade.cancel()
    assert signalled == []


def test_a_callback_that_raises_ends_the_builder(tmp_path: Path) -> None:
    def fail(status: str, progress: float) -> None:
        raise ZeroDivisionError

    upgrade, _ = plan(report_steps)
    with pytest.raises(ZeroDivisionError):
        upgrade.build(fail)
    assert upgrade._process is None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_builder_ends_when_the_server_does(tmp_path: Path, number: signal.Signals) -> None:
    """Also where the server has no time to say anything, and with all that the builder started."""
    server = f"""
import pathlib, sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from tests.service.engines.test_builder import build, sleep
build(sleep, pathlib.Path({str(tmp_path / "pids")!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", server], start_new_session=True)
    try:
        pids = read_pids(tmp_path / "pids")
        assert all(is_running(pid) for pid in pids)
    finally:
        process.send_signal(number)
        process.wait(TIMEOUT_S)
    for pid in pids:
        wait_for(partial(is_gone, pid))
