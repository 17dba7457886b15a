"""Ends a request's work at its deadline, or when its client has left."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Literal, TypeVar

from service.errors import DeadlineExceeded
from service.work.request import RequestProgress

Reason = Literal["deadline", "client_left"]
T = TypeVar("T")


class Stopped(Exception):
    """The work was cancelled before its end.

    Attributes:
        reason: Why.
    """

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason: Reason = reason


def describe_deadline(timeout_ms: int, progress: RequestProgress) -> DeadlineExceeded:
    """The error of a request whose deadline has passed."""
    return DeadlineExceeded(
        f"the request was not done within {timeout_ms} ms; {progress.done} of "
        f"{progress.canvases} canvases were done"
    )


async def run_in_time(
    work: Coroutine[Any, Any, T],
    deadline_s: float,
    leaving: Coroutine[Any, Any, None] | None = None,
) -> T:
    """Awaits `work` in the calling task, which is cancelled from outside as usual.

    Args:
        work: What is to be done.
        deadline_s: Of the event loop's clock.
        leaving: Returns when nobody waits for the work any more.

    Raises:
        Stopped: The deadline has passed, or `leaving` has returned.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    cancelled_before = task.cancelling()
    stopped: Reason | None = None

    def stop(reason: Reason) -> None:
        nonlocal stopped
        if stopped is None:
            stopped = reason
            task.cancel()

    async def watch(leaving: Coroutine[Any, Any, None]) -> None:
        await leaving
        stop("client_left")

    timer = loop.call_at(deadline_s, stop, "deadline")
    watcher = None if leaving is None else asyncio.ensure_future(watch(leaving))
    try:
        return await work
    except asyncio.CancelledError as error:
        if stopped is None or task.uncancel() > cancelled_before:
            raise  # it was cancelled from outside, too
        raise Stopped(stopped) from error
    finally:
        timer.cancel()
        if watcher is not None:
            watcher.cancel()
