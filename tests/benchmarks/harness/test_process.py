from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.harness import BenchmarkError, process
from benchmarks.harness.memory import added_bytes
from benchmarks.harness.process import ChildProcess
from benchmarks.harness.report import ROOT
from benchmarks.harness.server import serve

ECHO = """
import os
from benchmarks.harness.rounds import answer_lines
print("a library says hello", flush=True)
answer_lines(lambda line: {"line": line, "mood": os.environ["MOOD"]})
"""


def test_each_line_has_an_answer_whatever_else_is_printed() -> None:
    variables = {"MOOD": "calm", "PYTHONPATH": f"{ROOT}"}
    with ChildProcess([sys.executable, "-c", ECHO], environment=variables) as child:
        answers = [child.ask("1"), child.ask("two")]
    assert answers == [{"line": "1", "mood": "calm"}, {"line": "two", "mood": "calm"}]


def test_a_process_that_ends_early_is_named() -> None:
    with (
        ChildProcess([sys.executable, "-c", "input()"]) as child,
        pytest.raises(BenchmarkError, match=r"-c input\(\) ended early"),
    ):
        child.ask("1")


def test_processes_are_found_by_their_mark_and_all_ended(tmp_path: Path) -> None:
    # The child leaves the process group, as those of some frameworks do.
    child = "x = b'x' * 30_000_000\nprint('started', flush=True)\nwhile True: sum(range(10000))"
    code = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\n"
        "time.sleep(600)\n"
    )
    log = tmp_path / "log"
    with ChildProcess([sys.executable, "-c", code], log=log) as server:
        server.wait_until(lambda: "started" in log.read_text(), 60)
        with server.measure() as usage:
            time.sleep(0.5)
        assert usage.cpu_s > 0.02
        assert usage.peak_memory_bytes > 30e6
        assert len(process.find_processes(server.mark)) == 2
    assert process.find_processes(server.mark) == []


def test_a_server_that_cannot_start_tells_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    with (
        pytest.raises(BenchmarkError, match=r"exit status 1: no such thing"),
        serve(command, lambda url: False, log=tmp_path / "log"),
    ):
        pass


def test_a_server_that_fails_to_start_is_started_again(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    code = (
        f"import pathlib, sys, time; seen = pathlib.Path({str(seen)!r})\n"
        "if not seen.exists(): seen.touch(); sys.exit('not yet')\n"
        "seen.write_text('{port}'); time.sleep(600)\n"
    )
    with serve(
        [sys.executable, "-c", code],
        lambda url: seen.exists() and url.endswith(seen.read_text() or "-"),
        log=tmp_path / "log",
        attempts=2,
    ) as server:
        assert server.url == f"http://127.0.0.1:{seen.read_text()}"


def test_memory_that_is_freed_before_hides_nothing() -> None:
    blocks = [bytes(1 << 16) for _ in range(512)]
    blocks.clear()
    held: list[bytes] = []
    assert added_bytes(lambda: held.append(bytes(1) * (64 << 20))) > 60 << 20
    assert added_bytes(lambda: None) < 8 << 20
    assert added_bytes(lambda: held.append(bytes(1) * (64 << 20)), os.getpid()) > 60 << 20
