"""Builds a faster engine in a child process, while another engine serves.

The child is spawned with a pipe, over which it sends its progress and finally "done" or an error.
It has a low priority and its own memory, so a crash does not affect the server. It ends with its
parent.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import IO, Any

from service.engines.base import Backend, BackendError

logger = logging.getLogger(__name__)

NICENESS = 10
REPORT_S = 0.2
"""Least time between two reports of progress."""

Report = Callable[[str, float], None]
"""Called with the current step of a build and the fraction that is done (0..1)."""
Job = Callable[[Report], None]
"""Builds an engine and stores it; raises if that fails. It is pickled."""


class BuildFailed(Exception):
    """The engine was not built; says why."""


class Upgrade:
    """A faster engine that can replace a backend while that serves. It has no threads.

    Args:
        job: Runs in the child process.
        load: Gives the engine that the job has stored.
    """

    def __init__(self, job: Job, load: Callable[[], Backend]) -> None:
        self._job = job
        self._load = load
        self._lock = threading.Lock()
        self._process: SpawnProcess | None = None
        self._cancelled = False

    def build(self, report: Report) -> None:
        """Runs the job in a child process and waits for its end.

        Args:
            report: Called in this thread with the child's progress.

        Raises:
            BuildFailed: The job failed, the child died, or `cancel` was called.
        """
        with tempfile.TemporaryFile() as errors:  # has no name, so it never stays behind
            try:
                process, messages = self._start(Path(f"/proc/{os.getpid()}/fd/{errors.fileno()}"))
            except BuildFailed:
                raise
            except Exception as error:  # of the operating system or of pickling
                raise BuildFailed(f"the builder cannot be started: {error}") from error
            try:
                with messages:
                    outcome = _follow(messages, report)
            except BaseException:
                self._kill()
                raise
            finally:
                wait([process.sentinel])
                with self._lock:  # the process id may be reused after the join
                    process.join()
                    self._process = None
            if self._cancelled:
                raise BuildFailed("the build was cancelled")
            if outcome:
                raise BuildFailed(outcome)
            if outcome is None or process.exitcode != 0:
                end = _describe_exit(process.exitcode or 0)
                raise BuildFailed(f"{end}{_read_last_line(errors)}")

    def load(self) -> Backend:
        """The engine that was built.

        Raises:
            BackendError: It cannot be loaded.
        """
        return self._load()

    def cancel(self) -> None:
        """Kills the child and all that it started; any thread may call it, at any time."""
        self._cancelled = True
        self._kill()

    def _kill(self) -> None:
        with self._lock:
            if self._process is not None and self._process.is_alive():
                assert self._process.pid is not None
                with contextlib.suppress(ProcessLookupError):  # before it leads a session
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.kill()

    def _start(self, errors: Path) -> tuple[SpawnProcess, Connection]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_run, args=(self._job, theirs, errors), name="engine-builder", daemon=True
        )
        with theirs, self._lock:
            if self._cancelled:
                raise BuildFailed("the build was cancelled")
            process.start()
            self._process = process
        return process, ours


def _follow(messages: Connection, report: Report) -> str | None:
    """Passes progress on until the child ends.

    Returns:
        The job's error, "" if it is done, None if the child ended without a message.
    """
    outcome: str | None = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            kind, *content = messages.recv()
            if kind == "progress":
                report(*content)
            else:
                outcome = content[0]
    return outcome


def _run(job: Job, messages: Connection, errors: Path) -> None:
    """The child process."""
    os.setsid()  # Ctrl-C in the server's terminal does not reach it; `cancel` kills the group
    output = os.open(errors, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):  # also what libraries print
        os.dup2(output, standard)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    os.nice(NICENESS)
    try:
        job(_Progress(messages))
    except BackendError as error:  # any other is a traceback on stderr
        messages.send(("end", str(error)))
        raise SystemExit(1) from None
    messages.send(("end", ""))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)  # this process, and all that it has started


class _Progress:
    """Sends progress, but not more often than every `REPORT_S`; any thread may call it."""

    def __init__(self, messages: Any) -> None:
        self._messages = messages
        self._lock = threading.Lock()
        self._next_s = 0.0

    def __call__(self, status: str, progress: float) -> None:
        now_s = time.monotonic()
        with self._lock:
            if now_s < self._next_s and progress < 1:
                return
            self._next_s = now_s + REPORT_S
            self._messages.send(("progress", status, min(1.0, max(0.0, progress))))


def _describe_exit(status: int) -> str:
    if status < 0:
        return f"the builder was ended by {signal.Signals(-status).name}"
    return f"the builder ended with status {status} and no engine"


def _read_last_line(file: IO[bytes]) -> str:
    """The last line on its stderr, which for a Python error is the error."""
    file.seek(0)
    lines = file.read()[-4000:].decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f": {last}" if last else ""
