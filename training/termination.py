"""Stops training within seconds on SIGTERM, which cloud machines and job queues send."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import multiprocessing.util  # registers its own exit handler
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import Tensor, nn


class Terminated(Exception):
    """Training was stopped by SIGTERM; its checkpoint is written."""


class Interrupted(BaseException):
    """SIGTERM arrived in an interruptible part; not an `Exception`, so that no library hides it."""


class TerminationRequest:
    """Context manager in which the first SIGTERM only sets `received`, and a second one kills.

    Python sets signal handlers only in the main thread; in any other, `received` stays false.

    Args:
        alone: Whether there is only this process. Of several, which must agree on the step at which
            they stop, no part is interruptible, and further signals are ignored: job queues and
            torchrun may each send one.
    """

    def __init__(self, *, alone: bool = True) -> None:
        self.received = False
        self._alone = alone
        self._interruptible = False
        self._process = os.getpid()
        self._before: Any = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data loading process that has just been forked
            return
        self.received = True
        if self._alone:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._interruptible:
            raise Interrupted

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Context in which SIGTERM raises `Interrupted` at once.

        What runs in it must not change the state of the run.
        """
        if self._alone and self.received:
            raise Interrupted
        self._interruptible = self._alone
        try:
            yield
        finally:
            self._interruptible = False

    def __enter__(self) -> TerminationRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


def interrupt_backward(model: nn.Module) -> None:
    """Lets signals be handled during a backward pass on the CPU, once for each parameter.

    Python handles a signal only between operations of its own, and a backward pass is one.
    """

    def return_to_python(parameter: Tensor) -> None:
        pass

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(return_to_python)  # type: ignore[no-untyped-call]


def ignore_sigterm(worker: int) -> None:
    """Makes a data loading process ignore a SIGTERM that is sent to the whole job.

    The main process may need it to finish a step.
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
