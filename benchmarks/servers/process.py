"""A server of the comparison as processes: started, watched, ended.

Its processes are found by a variable that all of them inherit, for not every framework's are
children of the one that was started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

MARK = "SERVING_MARK"
START_S = 120.0
STOP_S = 15.0
_SAMPLE_S = 1.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


def find_processes(mark: str) -> list[Path]:
    """Folders in /proc of the living processes whose environment has the mark."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in _PROC.glob("[0-9]*"):
        with suppress(OSError):  # ended meanwhile, or somebody else's
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(folder)
    return found


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
    """What the server's processes used within a block."""

    cpu_s: float = 0.0
    peak_memory_bytes: int = 0


class ServerProcesses:
    """A server and all its processes.

    Args:
        command: Starts it.
        environment: Variables beside this process's.
        folder: Working folder.
        log: File for its output.

    Attributes:
        mark: By which its processes are found.
    """

    def __init__(
        self, command: Sequence[str], environment: dict[str, str], folder: Path, log: Path
    ) -> None:
        self.mark = uuid.uuid4().hex
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env=os.environ | environment | {MARK: self.mark},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait_until(self, is_ready: Callable[[], bool]) -> None:
        """Waits until the server answers.

        Raises:
            RuntimeError: It has ended, or took too long; with the end of its output.
        """
        deadline_s = time.monotonic() + START_S
        while not is_ready():
            ended = self._process.poll()
            if ended is not None or time.monotonic() > deadline_s:
                why = f"not ready after {START_S} s" if ended is None else f"exit status {ended}"
                raise RuntimeError(f"{why}: {self._log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)

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
        """Asks the server to end, then ends whatever of it is left."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        for _ in range(100):
            left = find_processes(self.mark)
            if not left:
                break
            for folder in left:
                with suppress(ProcessLookupError):
                    os.kill(int(folder.name), signal.SIGKILL)
            time.sleep(0.05)
        self._process.wait()
