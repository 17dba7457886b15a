"""Signals: what they mean, and an end that always comes."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

logger = logging.getLogger(__name__)

_EXIT_NAMES = ("SIGINT", "SIGTERM", "SIGQUIT", "SIGBREAK")
EXIT_SIGNALS = tuple(
    signal.Signals[name] for name in _EXIT_NAMES if name in signal.Signals.__members__
)
"""The first one drains, a second one ends the process at once."""
RELOAD_SIGNAL: signal.Signals | None = getattr(signal, "SIGHUP", None)
SIGNALS = EXIT_SIGNALS if RELOAD_SIGNAL is None else (*EXIT_SIGNALS, RELOAD_SIGNAL)
EXIT_FAILED = 70
"""Exit status of a process that must be replaced: its engines have failed for good."""
END_S = 5.0
"""How long a process may take to end after the drain timeout."""


def hold_reloads() -> None:
    """Keeps the reload signal pending until there is a handler, instead of ending the process."""
    if RELOAD_SIGNAL is not None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [RELOAD_SIGNAL])


@contextmanager
def handle_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Calls a function with the number of each signal that comes; needs the main thread."""

    def handler(number: int, frame: FrameType | None) -> None:
        handle(number)

    before = {number: signal.signal(number, handler) for number in SIGNALS}
    if RELOAD_SIGNAL is not None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [RELOAD_SIGNAL])
    try:
        yield
    finally:
        if RELOAD_SIGNAL is not None:
            hold_reloads()
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def handle_exit_signals(handle: Callable[[int], None], limit_s: float) -> Iterator[None]:
    """As `handle_signals`, in a process that drains.

    Args:
        handle: Called with all signals but a second one to exit, which ends the process at once.
        limit_s: When the process is aborted after the first one.
    """
    is_ending = False

    def handle_one(number: int) -> None:
        nonlocal is_ending
        if number in EXIT_SIGNALS:
            if is_ending:
                os._exit(128 + number)
            is_ending = True
            end_within(limit_s)
        handle(number)

    with handle_signals(handle_one):
        yield


def end_within(limit_s: float) -> None:
    """Ends the process with status 1 if it has not ended by itself within a time.

    Its event loop, or a thread that the interpreter waits for, may hang.
    """

    def end() -> None:
        logger.error("the process has not ended within %g s and is aborted", limit_s)
        os._exit(1)

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()


def end_process(status: int) -> NoReturn:
    """Ends the process once everything of it is closed, without finalising the interpreter.

    A daemon thread may still be in a library: in a call of a store that does not answer, or of an
    engine that hangs. The interpreter's end would wait for some libraries, and take others away
    while the thread uses them, which can abort the process. Handlers of `atexit` are not called.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # there is none, or it is closed
            stream.flush()
    os._exit(status)
