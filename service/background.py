"""Work beside the event loop's requests: tasks that are kept, functions in daemon threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


def spawn(work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
    """Starts a task that is kept in a set until it is done."""
    task = asyncio.get_running_loop().create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)


async def run_in_thread(
    function: Callable[[], T], discard: Callable[[T], None] = lambda result: None
) -> T:
    """Runs a function in a daemon thread, so that the end of the process does not wait for it.

    Args:
        function: What is run.
        discard: Gets the result if the caller was cancelled meanwhile.

    Raises:
        Exception: What the function raised.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def set_result(result: T) -> None:
        if done.done():
            discard(result)
        else:
            done.set_result(result)

    def set_exception(error: BaseException) -> None:
        if not done.done():
            done.set_exception(error)

    def run() -> None:
        with suppress(RuntimeError):  # the loop is closed
            try:
                result = function()
            except BaseException as error:
                loop.call_soon_threadsafe(set_exception, error)
            else:
                loop.call_soon_threadsafe(set_result, result)

    threading.Thread(target=run, name="background", daemon=True).start()
    return await done
