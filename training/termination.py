"""Stops training at the next step on SIGTERM, which cloud machines and job queues send."""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.util  # registers its own exit handler
import signal
import threading
from types import FrameType
from typing import Any


class Terminated(Exception):
    """Training was stopped by SIGTERM; its checkpoint is written."""


class TerminationRequest:
    """Context manager in which SIGTERM only sets `received`.

    Python sets signal handlers only in the main thread; in any other, `received` stays false.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: Any = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def __enter__(self) -> TerminationRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


def ignore_sigterm(worker: int) -> None:
    """Makes a data loading process ignore a SIGTERM that is sent to the whole job.

    The main process finishes its step, for which it may need this process.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _kill_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler would raise an error
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


# Exit handlers run in reverse order of registration: this one runs before that of multiprocessing,
# which sends SIGTERM to data loading processes that are left after an error and waits for them.
atexit.register(_kill_workers)
