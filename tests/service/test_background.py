"""Tasks and daemon threads."""

from __future__ import annotations

import asyncio
import threading

import pytest

from service.background import run_in_thread, spawn
from tests.support.waiting import wait_until


async def test_results_and_errors_come_back() -> None:
    def fail() -> None:
        raise RuntimeError("7 is wrong")

    assert await run_in_thread(lambda: 7) == 7
    with pytest.raises(RuntimeError, match="7 is wrong"):
        await run_in_thread(fail)


async def test_a_result_that_nobody_waits_for_is_discarded() -> None:
    go = threading.Event()
    discarded: list[int] = []

    def work() -> int:
        go.wait(10)
        return 7

    task = asyncio.create_task(run_in_thread(work, discarded.append))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait([task])
    go.set()
    await wait_until(lambda: discarded == [7])


async def test_the_thread_does_not_keep_the_process() -> None:
    assert await run_in_thread(lambda: threading.current_thread().daemon)


async def test_a_task_is_kept_until_it_is_done() -> None:
    tasks: set[asyncio.Task[None]] = set()
    done = asyncio.Event()

    async def work() -> None:
        await done.wait()

    spawn(work(), tasks)
    assert len(tasks) == 1
    done.set()
    await wait_until(lambda: not tasks)
