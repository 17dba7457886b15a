"""SIGTERM as a request to stop at the next step, as cloud machines and job queues send it."""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.util  # registers its own way out of the interpreter
import signal
import threading
from types import FrameType
from typing import Any


class Terminated(Exception):
    """Training stopped because it was asked to; its checkpoint is written."""


class TerminationRequest:
    """While entered, SIGTERM sets `received` and does nothing else.

    In a thread other than the main one, where Python sets no handlers, it stays false.
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
    """Set-up of a data loading process: a SIGTERM to the whole job must not end it.

    The main process finishes its step, which may need this one.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _kill_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler would call it a failure
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


# Later registrations run earlier: before multiprocessing's own, which sends SIGTERM to data loading
# processes that an error has left behind, and waits.
atexit.register(_kill_workers)
