"""A measured child process and all that it starts: CPU time, memory, and an end.

It has a session of its own. Its processes are found by a variable that they inherit: not every
framework's are descendants of the one that was started, or in its session.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import BenchmarkError
from benchmarks.harness.report import ROOT

MARK = "BENCHMARK_MARK"
STOP_S = 15.0
_SAMPLE_S = 1.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def find_processes(mark: str) -> list[Path]:
    """Folders in /proc of the living processes whose environment has the mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended meanwhile, or of another user
            for line in (folder / "environ").read_bytes().split(b"\0"):
                name, _, marks = line.decode(errors="replace").partition("=")
                if name == MARK and mark in marks.split(":"):
                    found.append(folder)
    return found


def kill_processes(mark: str) -> None:
    """Kills the living processes of a mark; waits up to 5 s until none is left."""
    for _ in range(100):
        left = find_processes(mark)
        if not left:
            return
        for folder in left:
            with suppress(ProcessLookupError):
                os.kill(int(folder.name), signal.SIGKILL)
        time.sleep(0.05)


def read_cpu_s(folders: Sequence[Path]) -> float:
    """CPU seconds of processes and of their children that have ended."""
    total = 0
    for folder in folders:
        with suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
    return total / _TICKS_PER_S


def read_memory_bytes(folders: Sequence[Path]) -> int:
    """Memory of processes; pages that they share count once (PSS)."""
    total = 0
    for folder in folders:
        with suppress(OSError):
            lines = (folder / "smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


@dataclass
class Usage:
    """What the processes used within a block."""

    cpu_s: float = 0.0
    peak_memory_bytes: int = 0


class ChildProcess:
    """A child process; leaving the context ends it and all that it started.

    Args:
        command: What is run.
        folder: Working folder.
        environment: Variables beside this process's.
        log: File for its output; without one it is asked line by line (`ask`).
        mark: What `find_processes` finds it by; None takes a new one.
        stop_s: How long it may take to end when it is stopped.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        folder: Path = ROOT,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
        mark: str | None = None,
        stop_s: float = STOP_S,
    ) -> None:
        self.mark = mark or uuid.uuid4().hex
        self._stop_s = stop_s
        marks = f"{os.environ.get(MARK, '')}:{self.mark}"  # it is also its parents' process
        self._command = command
        self._log = log
        output = log.open("wb") if log is not None else subprocess.PIPE
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONWARNINGS": "ignore", **(environment or {}), MARK: marks},
            stdin=subprocess.DEVNULL if log is not None else subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT if log is not None else None,
            start_new_session=True,
        )
        if not isinstance(output, int):
            output.close()

    @property
    def pid(self) -> int:
        """Of the process that was started."""
        return self._process.pid

    def ask(self, line: str) -> dict[str, Any]:
        """Sends a line and waits for the answer, a line of JSON; see `rounds.answer_lines`.

        Raises:
            BenchmarkError: The process ended without one.
        """
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(f"{line}\n".encode())
            process.stdin.flush()
        for answer in process.stdout:
            if answer.startswith(b"{"):  # libraries print other lines too
                report: dict[str, Any] = json.loads(answer)
                return report
        raise BenchmarkError(f"{' '.join(self._command)} ended early, see above")

    def wait_until(self, is_ready: Callable[[], bool], timeout_s: float) -> None:
        """Polls a condition.

        Raises:
            BenchmarkError: The process has ended, or took too long; with the end of its output.
        """
        deadline_s = time.monotonic() + timeout_s
        while not is_ready():
            ended = self._process.poll()
            if ended is not None or time.monotonic() > deadline_s:
                why = f"not ready after {timeout_s} s" if ended is None else f"exit status {ended}"
                output = self._log.read_text(errors="replace")[-2000:] if self._log else ""
                raise BenchmarkError(f"{' '.join(self._command)}: {why}: {output}")
            time.sleep(0.1)

    def wait(self, timeout_s: float) -> int | None:
        """Exit status, negative for a signal; None if it has not ended in time."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout_s)
        return None

    @contextmanager
    def measure(self) -> Iterator[Usage]:
        """Measures what the processes use meanwhile."""
        usage, ended = Usage(), threading.Event()

        def watch() -> None:
            while True:
                memory = read_memory_bytes(find_processes(self.mark))
                usage.peak_memory_bytes = max(usage.peak_memory_bytes, memory)
                if ended.wait(_SAMPLE_S):
                    return

        before_s = read_cpu_s(find_processes(self.mark))
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield usage
        finally:
            usage.cpu_s = read_cpu_s(find_processes(self.mark)) - before_s
            ended.set()
            watcher.join()

    def stop(self) -> None:
        """Asks the process to end, then kills what is left of it, its session and children."""
        process = self._process
        if process.stdin is not None:
            with suppress(BrokenPipeError):
                process.stdin.close()
        elif process.poll() is None:
            process.send_signal(signal.SIGTERM)
        self.wait(self._stop_s)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        kill_processes(self.mark)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()

    def __enter__(self) -> ChildProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
