"""Starts several processes as torchrun does, without its agent."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_python(arguments: list[str], count: int) -> list[subprocess.Popen[str]]:
    """`python ARGUMENTS` in `count` processes that find each other; one is started alone."""
    common = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if count > 1:
        common |= {
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def finish(processes: list[subprocess.Popen[str]], timeout_s: float = 300) -> list[tuple[int, str]]:
    """Waits; the exit status and what was written to stdout and stderr, of each process."""
    try:
        written = [process.communicate(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, out + err) for p, (out, err) in zip(processes, written, strict=True)]
