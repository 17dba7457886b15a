"""Waiting for what comes about elsewhere: in a thread, or in another process."""

from __future__ import annotations

import time
from collections.abc import Callable


def poll_until(condition: Callable[[], bool], *, timeout_s: float, pause_s: float) -> None:
    """Asks again and again until a condition holds.

    Raises:
        AssertionError: The time is up.
    """
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"it has not come in {timeout_s:g} s"
        time.sleep(pause_s)
