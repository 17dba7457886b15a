from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from service.work.pools import RankedPool


class Gate:
    """Steps that note their name and wait until they may go on."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.go = threading.Event()

    def step(self, name: str) -> Callable[[], str]:
        def run() -> str:
            self.ran.append(name)
            assert self.go.wait(10)
            return name

        return run


async def start(pool: RankedPool, gate: Gate, name: str, rank: float) -> asyncio.Task[str]:
    task = asyncio.create_task(pool.run(gate.step(name), rank))
    await asyncio.sleep(0)
    return task


async def test_waiting_steps_run_by_rank_and_then_by_arrival() -> None:
    pool, gate = RankedPool(1, "test"), Gate()
    ahead = [await start(pool, gate, name, 0) for name in ("runs", "handed over")]
    late = [await start(pool, gate, name, rank) for name, rank in (("c", 2), ("a", 1), ("b", 1))]
    gate.go.set()
    assert await asyncio.gather(*ahead, *late) == ["runs", "handed over", "c", "a", "b"]
    assert gate.ran == ["runs", "handed over", "a", "b", "c"]
    pool.shutdown()


async def test_a_step_that_was_cancelled_while_it_waited_never_runs() -> None:
    pool, gate = RankedPool(1, "test"), Gate()
    ahead = [await start(pool, gate, name, 0) for name in ("runs", "handed over")]
    left, stays = await start(pool, gate, "left", 0), await start(pool, gate, "stays", 0)
    left.cancel()
    gate.go.set()
    assert await stays == "stays"
    await asyncio.gather(*ahead)
    assert gate.ran == ["runs", "handed over", "stays"]
    pool.shutdown()


async def test_a_thread_is_busy_until_its_step_ends_even_if_the_caller_left() -> None:
    pool, gate = RankedPool(1, "test"), Gate()
    left = await start(pool, gate, "left", 0)
    while not gate.ran:
        await asyncio.sleep(0.001)
    ahead = await start(pool, gate, "handed over", 0)
    waits = await start(pool, gate, "waits", 0)
    left.cancel()
    await asyncio.sleep(0.02)
    assert gate.ran == ["left"]
    gate.go.set()
    assert (await ahead, await waits) == ("handed over", "waits")
    pool.shutdown()


async def test_an_error_of_a_step_is_its_callers_and_frees_the_thread() -> None:
    pool = RankedPool(1, "test")

    def fail() -> None:
        raise ValueError("7 is wrong")

    for _ in range(5):
        with pytest.raises(ValueError, match="7 is wrong"):
            await pool.run(fail, 0)
    assert await pool.run(lambda: 3, 0) == 3
    pool.shutdown()


async def test_cancelling_at_random_loses_no_thread() -> None:
    pool = RankedPool(2, "test")
    for round_ in range(50):
        tasks = [asyncio.create_task(pool.run(lambda: None, rank)) for rank in range(12)]
        for _ in range(round_ % 7):
            await asyncio.sleep(0)
        for task in tasks[round_ % 3 :: 2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    threads = threading.Barrier(2, timeout=10)
    await asyncio.gather(*(pool.run(threads.wait, 0) for _ in range(2)))
    pool.shutdown()


async def test_a_pool_that_was_shut_down_drops_what_waits_and_takes_nothing_more() -> None:
    pool, gate = RankedPool(1, "test"), Gate()
    runs = await start(pool, gate, "runs", 0)
    while not gate.ran:
        await asyncio.sleep(0.001)
    waits = await start(pool, gate, "waits", 0)
    pool.shutdown()
    gate.go.set()
    assert await runs == "runs"
    with pytest.raises(RuntimeError, match="shut down"):
        await pool.run(gate.step("late"), 0)
    assert gate.ran == ["runs"]
    waits.cancel()


async def test_threads_end_with_their_pool() -> None:
    pool = RankedPool(2, "ending")
    await pool.run(lambda: None, 0)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("ending_")]
    assert len(threads) == 2
    pool.shutdown()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


async def test_steps_that_nobody_waits_for_run_by_rank_unless_dropped() -> None:
    pool, gate = RankedPool(1, "test"), Gate()
    ahead = await start(pool, gate, "runs", 0)
    while not gate.ran:
        await asyncio.sleep(0.001)
    ended = threading.Event()
    pool.submit(ended.set, 3)
    pool.submit(lambda: gate.ran.append("b"), 2)
    dropped = pool.submit(lambda: gate.ran.append("dropped"), 1)
    pool.submit(lambda: gate.ran.append("a"), 1)
    dropped.drop()
    gate.go.set()
    assert await ahead == "runs"
    assert await asyncio.to_thread(ended.wait, 10)
    assert gate.ran == ["runs", "a", "b"]
    pool.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        pool.submit(ended.set, 0)


async def test_a_thread_that_is_replaced_ends_after_its_step_and_another_works() -> None:
    pool, gate = RankedPool(1, "test"), Gate()
    hangs = await start(pool, gate, "hangs", 0)
    while not gate.ran:
        await asyncio.sleep(0.001)
    (stuck,) = (thread for thread in threading.enumerate() if thread.name == "test_0")
    assert pool.replace(stuck)
    assert not pool.replace(stuck)  # it is the pool's no more
    assert await pool.run(threading.current_thread, 0) is not stuck
    gate.go.set()
    assert await hangs == "hangs"
    await asyncio.to_thread(stuck.join, 10)
    assert not stuck.is_alive()
    assert await pool.run(lambda: 3, 0) == 3
    pool.shutdown()
