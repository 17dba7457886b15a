"""Data loading processes and their parent; test_interruption.py has whole runs."""

from __future__ import annotations

import fcntl
import signal
import time
from pathlib import Path

from tests.support.processes import signal_groups, start_python, wait_until

PARENT = """
import fcntl, multiprocessing, os, signal, sys, time
from training.termination import init_worker

def load(path):
    init_worker(0)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.raise_signal(number)
    file = open(path, "w")
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write("locked")
    file.flush()
    time.sleep(600)

context = multiprocessing.get_context("fork")
context.Process(target=load, args=(sys.argv[1],)).start()
later = context.Process(target=time.sleep, args=(600,))
later.start()
open(sys.argv[2], "w").close()
later.join()
"""


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a file; the end of the process releases it."""
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_worker_ends_with_its_parent_although_a_later_process_stays(tmp_path: Path) -> None:
    """The later process keeps the sentinel of the parent open."""
    locked, forked = tmp_path / "locked", tmp_path / "forked"
    processes = start_python([["-c", PARENT, str(locked), str(forked)]])
    try:
        wait_until(
            lambda: forked.exists() and locked.exists() and locked.stat().st_size > 0, processes, 60
        )
        time.sleep(2)
        assert is_locked(locked)  # as long as the parent runs
        processes[0].kill()
        processes[0].wait()
        deadline = time.monotonic() + 60
        while is_locked(locked) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_locked(locked)
    finally:
        signal_groups(processes, signal.SIGKILL)
        processes[0].communicate()
