"""Starts several processes as torchrun does, without its agent."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_python(commands: Sequence[Sequence[str]]) -> list[subprocess.Popen[str]]:
    """`python COMMAND` once per command; several find each other, one is alone.

    Each leads a process group of its own, which holds its data loading processes too.
    """
    count = len(commands)
    common = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if count > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        common |= address | {"WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank, command in enumerate(commands)
    ]


def signal_groups(processes: Sequence[subprocess.Popen[str]], number: signal.Signals) -> None:
    """Sends a signal to every process and those that it started."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def finish(
    processes: Sequence[subprocess.Popen[str]], timeout_s: float = 300
) -> list[tuple[int, str]]:
    """Waits; the exit status and what was written to stdout and stderr, of each process."""
    try:
        written = [process.communicate(timeout=timeout_s) for process in processes]
    finally:
        signal_groups(processes, signal.SIGKILL)
    return [(p.returncode, out + err) for p, (out, err) in zip(processes, written, strict=True)]


def wait_until(
    condition: Callable[[], bool],
    processes: Sequence[subprocess.Popen[str]],
    timeout_s: float = 300,
) -> None:
    """Polls a condition that the processes bring about; they must not end before.

    Raises:
        AssertionError: A process has ended, or the time is up.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        ended = [p for p in processes if p.poll() is not None]
        if ended or time.monotonic() > deadline:
            signal_groups(processes, signal.SIGKILL)
            raise AssertionError([p.communicate() for p in ended] or "timed out")
        time.sleep(0.02)
