"""A test that exceeds its time limit ends with its name and all stacks, the others run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.time_limit import SLOW_S

ROOT = Path(__file__).resolve().parents[1]
HANGING = """
import asyncio, threading

def wait_for_ever(started, lock):
    started.set()
    lock.acquire()

def test_deadlock():
    lock, started = threading.Lock(), threading.Event()
    lock.acquire()
    thread = threading.Thread(target=wait_for_ever, args=(started, lock), name="the other")
    thread.start()
    started.wait()
    thread.join()

async def test_a_coroutine():
    await asyncio.Event().wait()

def test_next():
    pass
"""


def run(folder: Path, selected: str, *options: str) -> str:
    """Output of a run of hanging tests, which is expected to fail."""
    (folder / "test_hanging.py").write_text(HANGING)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml")]
    command += ["-p", "tests.conftest", "-p", "no:cacheprovider", "--rootdir", str(folder)]
    command += ["-rN"]  # the summary repeats messages in full where CI is set
    done = subprocess.run(
        [*command, "--timeout", "1", *options, folder / selected],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_deadlock_shows_both_threads(tmp_path: Path) -> None:
    output = run(tmp_path, "test_hanging.py::test_deadlock")
    assert "test_hanging.py::test_deadlock exceeded its time limit of 1 s" in output
    assert "is the other" in output
    assert "in wait_for_ever" in output
    assert "in test_deadlock" in output


def test_a_coroutine_shows_where_it_waits(tmp_path: Path) -> None:
    output = run(tmp_path, "test_hanging.py::test_a_coroutine")
    assert "test_hanging.py::test_a_coroutine exceeded its time limit of 1 s" in output
    assert "in test_a_coroutine\n    await asyncio.Event().wait()" in output


def test_in_a_worker_the_next_test_runs(tmp_path: Path) -> None:
    output = run(tmp_path, "test_hanging.py", "-n", "1", "--dist", "loadscope")
    for name in ("test_deadlock", "test_a_coroutine"):
        assert output.count(f"test_hanging.py::{name} exceeded its time limit") == 1
        assert output.count(f"crashed while running 'test_hanging.py::{name}'") == 1
    assert "in wait_for_ever" in output
    assert "2 failed, 1 passed" in output


@pytest.mark.slow
def test_a_slow_test_has_a_longer_limit(request: pytest.FixtureRequest) -> None:
    (limit,) = (mark.args[0] for mark in request.node.iter_markers("timeout"))
    assert limit == SLOW_S > float(request.config.getini("timeout"))
