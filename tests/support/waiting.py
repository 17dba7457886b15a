"""Waits for a condition that another thread or process brings about."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


def poll_until(
    condition: Callable[[], bool],
    *,
    timeout_s: float,
    pause_s: float,
    describe: Callable[[], str] = str,
) -> None:
    """Returns as soon as a condition holds.

    Args:
        condition: Is asked again and again.
        timeout_s: After this time it fails.
        pause_s: Between two questions.
        describe: The state that a failure reports.

    Raises:
        AssertionError: The condition does not hold within `timeout_s`.
    """
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline_s:
            raise AssertionError(
                f"the condition does not hold after {timeout_s:g} s; {describe()}".rstrip("; ")
            )
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
