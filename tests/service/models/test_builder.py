from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pipeline.types import Candidates, Tile, Window
from service.engines.base import BackendError, Precision
from service.models.builder import BuildJob, SwitchingBackend
from tests.support.waiting import poll_until

TIMEOUT_S = 60.0
DONE = "print('{\"done\": true}')"


class FakeBackend:
    """Answers with its own mark and the tile's, and counts what it is asked."""

    device = "cpu"
    precision: Precision = "fp32"

    def __init__(self, name: str, mark: int, concurrency: int = 1) -> None:
        self.name = name
        self.reason = f"{name} works"
        self.concurrency = concurrency
        self.mark = mark
        self.closed = 0
        self.inside = 0
        self.most_inside = 0
        self.gate = threading.Event()
        self.gate.set()
        self._lock = threading.Lock()
        self.seen: list[int] = []

    def infer(self, tiles: Sequence[Tile]) -> list[Candidates]:
        if self.closed:
            raise BackendError(f"{self.name} is closed")
        with self._lock:
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
            self.seen += [tile.valid_hw[0] for tile in tiles]
        assert self.gate.wait(TIMEOUT_S)
        with self._lock:
            self.inside -= 1
        return [
            Candidates(
                np.array([0.5], np.float32),
                np.array([self.mark * 10_000 + tile.valid_hw[0]]),
                np.zeros((1, 2, 2), np.float32),
            )
            for tile in tiles
        ]

    def close(self) -> None:
        self.closed += 1


def build_tile(number: int) -> Tile:
    return Tile(np.zeros((4, 4, 3), np.uint8), (number, 4), Window(0, 0, 4, 4))


def ask(backend: SwitchingBackend, number: int) -> int:
    """The mark of who answered; the answer must be the tile's own."""
    (found,) = backend.infer([build_tile(number)])
    mark, answered = divmod(int(found.labels[0]), 10_000)
    assert answered == number
    return mark


def run_python(code: str) -> BuildJob:
    return BuildJob([sys.executable, "-c", code])


def build_when(go: Path, before: str = "") -> BuildJob:
    """A builder that is done as soon as a file is there."""
    return run_python(
        f"""
import pathlib, time
{before}
while not pathlib.Path({str(go)!r}).exists():
    time.sleep(0.01)
{DONE}
"""
    )


wait_for = partial(poll_until, timeout_s=TIMEOUT_S, pause_s=0.005)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def switch(
    job: BuildJob,
    first: FakeBackend,
    second: FakeBackend,
    warm: Callable[[object], None] = lambda backend: None,
) -> SwitchingBackend:
    return SwitchingBackend(first, job, lambda: second, warm, concurrency=second.concurrency)


def test_the_second_takes_over_and_the_first_is_closed() -> None:
    first, second = FakeBackend("slow", 1), FakeBackend("fast", 2, concurrency=2)
    warmed: list[object] = []
    backend = switch(run_python(DONE), first, second, warmed.append)
    wait_for(lambda: backend.status == "switched")
    wait_for(lambda: first.closed == 1)
    assert warmed == [second]
    assert (backend.name, backend.reason, backend.progress) == ("fast", "fast works", 1.0)
    assert backend.concurrency == 2
    assert ask(backend, 7) == 2
    backend.close()
    assert second.closed == 1


def test_the_first_serves_and_progress_is_seen(tmp_path: Path) -> None:
    first, second = FakeBackend("slow", 1), FakeBackend("fast", 2)
    go = tmp_path / "go"
    say = """
print("a library prints something", flush=True)
print('{"status": "tactics", "progress": 0.25}', flush=True)
"""
    backend = switch(build_when(go, say), first, second)
    wait_for(lambda: backend.status == "tactics")
    assert backend.progress == 0.25
    assert backend.reason == "slow works; a faster engine is being built"
    assert ask(backend, 3) == 1
    go.touch()
    wait_for(lambda: backend.status == "switched")
    assert ask(backend, 4) == 2
    backend.close()


def test_no_call_is_lost_or_repeated_by_the_change(tmp_path: Path) -> None:
    first, second = FakeBackend("slow", 1), FakeBackend("fast", 2, concurrency=3)
    go = tmp_path / "go"
    backend = switch(build_when(go), first, second)
    marks: dict[int, int] = {}
    failures: list[BaseException] = []

    def call(start: int) -> None:
        try:
            for number in range(start, start + 300):
                marks[number] = ask(backend, number)
                time.sleep(0.001)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(1 + 300 * i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(marks) > 100)
    go.touch()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert failures == []
    assert set(marks.values()) == {1, 2}, "the change fell outside the calls"
    assert sorted(first.seen + second.seen) == list(range(1, 1801))
    assert first.most_inside == 1
    assert second.most_inside <= 3
    wait_for(lambda: first.closed == 1)
    backend.close()


def test_the_first_is_not_closed_under_a_call(tmp_path: Path) -> None:
    first, second = FakeBackend("slow", 1), FakeBackend("fast", 2)
    first.gate.clear()
    backend = switch(build_when(tmp_path / "go"), first, second)
    answers: list[int] = []
    late = threading.Thread(target=lambda: answers.append(ask(backend, 9)))
    late.start()
    wait_for(lambda: first.inside == 1)
    (tmp_path / "go").touch()
    wait_for(lambda: backend.status == "switched")
    assert ask(backend, 10) == 2
    assert first.closed == 0
    first.gate.set()
    late.join(TIMEOUT_S)
    assert answers == [1]
    wait_for(lambda: first.closed == 1)
    backend.close()


def test_whoever_waits_for_the_first_goes_to_the_second(tmp_path: Path) -> None:
    first, second = FakeBackend("slow", 1), FakeBackend("fast", 2, concurrency=2)
    first.gate.clear()
    backend = switch(build_when(tmp_path / "go"), first, second)
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(ask(backend, 5))) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_for(lambda: first.inside == 1)
    (tmp_path / "go").touch()
    wait_for(lambda: len(answers) == 1)
    assert answers == [2]
    first.gate.set()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert sorted(answers) == [1, 2]
    backend.close()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("""print('{"error": "node conv_1 (Conv): no"}')""", r"node conv_1 \(Conv\): no"),
        ("raise ValueError('broken')", "ended with status 1 and no engine: ValueError: broken"),
        ("pass", "ended with status 0 and no engine"),
        (DONE + "; raise SystemExit(3)", "ended with status 3 and no engine"),
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        ("print('[1, 2]'); print('null'); print('{')", "ended with status 0"),
    ],
)
def test_a_failed_build_keeps_the_first(code: str, reason: str) -> None:
    first, second = FakeBackend("slow", 1), FakeBackend("fast", 2)
    backend = switch(run_python(code), first, second)
    wait_for(lambda: backend.status == "failed")
    assert backend.name == "slow"
    assert re.search(reason, backend.reason)
    assert backend.reason.startswith("slow works; the faster engine failed: ")
    assert ask(backend, 1) == 1
    backend.close()
    assert (first.closed, second.closed) == (1, 0)


def test_a_killed_builder_keeps_the_first(tmp_path: Path) -> None:
    first, second = FakeBackend("slow", 1), FakeBackend("fast", 2)
    pid_file = tmp_path / "pid"
    code = f"""
import os, pathlib, time
pathlib.Path({str(pid_file)!r}).write_text(f"{{os.getpid()}}.")
time.sleep(600)
"""
    backend = switch(run_python(code), first, second)
    wait_for(lambda: pid_file.exists() and pid_file.read_text().endswith("."))
    os.kill(int(pid_file.read_text()[:-1]), signal.SIGKILL)
    wait_for(lambda: backend.status == "failed")
    assert "ended by SIGKILL" in backend.reason
    assert ask(backend, 1) == 1
    backend.close()


def test_a_builder_that_never_reads_its_job_is_told_of() -> None:
    job = BuildJob([sys.executable, "-c", "raise OSError('no room')"], b"x" * 10_000_000)
    backend = switch(job, FakeBackend("slow", 1), FakeBackend("fast", 2))
    wait_for(lambda: backend.status == "failed")
    assert backend.reason.endswith("OSError: no room")
    backend.close()


def test_a_builder_that_is_not_there_is_told_of() -> None:
    backend = switch(BuildJob(["/nowhere/builder"]), FakeBackend("slow", 1), FakeBackend("fast", 2))
    wait_for(lambda: backend.status == "failed")
    assert "/nowhere/builder" in backend.reason
    backend.close()


def test_an_engine_that_does_not_load_keeps_the_first() -> None:
    def load() -> FakeBackend:
        raise BackendError("the plan is refused")

    backend = SwitchingBackend(FakeBackend("slow", 1), run_python(DONE), load, lambda backend: None)
    wait_for(lambda: backend.status == "failed")
    assert backend.reason == "slow works; the faster engine failed: the plan is refused"
    backend.close()


def test_an_engine_whose_first_run_is_wrong_is_closed() -> None:
    def warm(backend: object) -> None:
        raise BackendError("masks are (3, 4)")

    first, second = FakeBackend("slow", 1), FakeBackend("fast", 2)
    backend = switch(run_python(DONE), first, second, warm)
    wait_for(lambda: backend.status == "failed")
    assert "masks are (3, 4)" in backend.reason
    assert (first.closed, second.closed) == (0, 1)
    backend.close()


def test_close_ends_the_builder_and_all_that_it_started(tmp_path: Path) -> None:
    first, second = FakeBackend("slow", 1), FakeBackend("fast", 2)
    pids = tmp_path / "pids"
    code = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open({str(pids)!r}, "w") as file:
    file.write(f"{{os.getpid()}} {{child.pid}} .")
time.sleep(600)
"""
    backend = switch(run_python(code), first, second)
    wait_for(lambda: pids.exists() and pids.read_text().endswith("."))
    backend.close()
    assert backend.status == "closed"
    for pid in map(int, pids.read_text().split()[:2]):
        wait_for(lambda pid=pid: not is_running(pid))  # type: ignore[misc]
    assert (first.closed, second.closed) == (1, 0)
    with pytest.raises(BackendError, match="closed"):
        ask(backend, 1)


def test_close_signals_no_builder_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number may be another process's by then."""
    backend = switch(run_python(DONE), FakeBackend("slow", 1), FakeBackend("fast", 2))
    wait_for(lambda: backend.status == "switched")
    signalled: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda group, number: signalled.append(group))
    backend.close()
    assert signalled == []


def test_close_while_the_second_loads_closes_both() -> None:
    first, second = FakeBackend("slow", 1), FakeBackend("fast", 2)
    loading, go = threading.Event(), threading.Event()

    def load() -> FakeBackend:
        loading.set()
        assert go.wait(TIMEOUT_S)
        return second

    backend = SwitchingBackend(first, run_python(DONE), load, lambda backend: None)
    assert loading.wait(TIMEOUT_S)
    closer = threading.Thread(target=backend.close)
    closer.start()
    wait_for(lambda: backend.status == "closed")
    go.set()
    closer.join(TIMEOUT_S)
    assert (first.closed, second.closed) == (1, 1)
    assert backend.name == "slow"


def test_the_builder_ends_when_the_server_is_killed(tmp_path: Path) -> None:
    """kill -9 of the server: stdin ends, as `trt_process` watches it."""
    pid_file = tmp_path / "pid"
    child = f"""
import os
from service.engines.tensorrt.process import _end_with_parent
_end_with_parent()
with open({str(pid_file)!r}, "w") as file:
    file.write(str(os.getpid()) + ".")
import time
time.sleep(600)
"""
    server = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from service.models.builder import BuildJob, SwitchingBackend
from tests.service.models.test_builder import FakeBackend, run_python, switch
backend = switch(run_python({child!r}), FakeBackend("slow", 1), FakeBackend("fast", 2))
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", server], start_new_session=True)
    try:
        wait_for(lambda: pid_file.exists() and pid_file.read_text().endswith("."))
        assert is_running(int(pid_file.read_text()[:-1]))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(TIMEOUT_S)
    wait_for(lambda: not is_running(int(pid_file.read_text()[:-1])))
