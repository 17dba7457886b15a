"""Waits for a condition that another thread or process brings about."""

from __future__ import annotations

import time
from collections.abc import Callable


def poll_until(condition: Callable[[], bool], *, timeout_s: float, pause_s: float) -> None:
    """Returns as soon as a condition holds.

    Raises:
        AssertionError: It does not hold within `timeout_s`.
    """
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"the condition does not hold after {timeout_s:g} s"
        time.sleep(pause_s)
