"""Waiting for what comes about elsewhere: in a thread, or in another process."""

from __future__ import annotations

import asyncio
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


async def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """As `poll_until`, in an event loop, which goes on meanwhile.

    Raises:
        AssertionError: The time is up.
    """
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"it has not come in {timeout_s:g} s"
        await asyncio.sleep(0.002)
