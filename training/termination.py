"""SIGTERM as a request to stop at the next step, as cloud machines and job queues send it."""

from __future__ import annotations

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


def outlive_one_sigterm(worker: int) -> None:
    """Set-up of a data loading process: a SIGTERM to the whole job must not end it first.

    The main process finishes its step, which may need this one; then it ends its workers.
    """

    def ignore_once(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, ignore_once)
