"""How work ends early: requests that leave, failures, calls that hang, drain and abort."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from pipeline.types import Candidates, Tile
from service.engines.base import BackendError
from service.errors import Draining, EngineError
from service.work import image as image_module
from service.work.pixels import PixelBudget
from service.work.policy import Policy
from service.work.scheduler import CallStats
from tests.support.canvases import BAD, build_job, build_work
from tests.support.scheduling import errors_of, leave_at_random, open_bench, settle, until


async def test_a_request_that_leaves_while_it_waits_is_never_opened() -> None:
    async with open_bench() as bench:
        held = await bench.hold()
        left, stays = bench.start(2), bench.start(3)
        await asyncio.sleep(0)
        assert bench.scheduler.waiting == 3
        left.cancel()
        await asyncio.sleep(0)
        assert bench.scheduler.waiting == 2
        bench.engine.go.set()
        await settle([held, stays])
        assert bench.engine.values == [1, 3]
        assert left.cancelled()


async def test_a_request_that_leaves_stops_within_one_canvas() -> None:
    async with open_bench() as bench:
        left = await bench.hold(1, 2, 3, 4)
        assert bench.budget.held
        left.cancel()
        await asyncio.wait([left])
        assert bench.budget.held == 0
        bench.engine.go.set()
        await settle([bench.start(9)])
        assert bench.engine.values == [1, 9]


@pytest.mark.parametrize("when", ["before", "while"])
async def test_a_request_that_leaves_while_its_image_is_decoded_keeps_no_pixels(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves before the file is looked at, or when its pixels have just been read."""
    async with open_bench() as bench:
        job = build_job(build_work(1, 2, 3))
        (image,) = job.images
        entered, go = threading.Event(), threading.Event()
        target, name = (image, "open") if when == "before" else (image_module, "prepare")
        step = getattr(target, name)

        def take_slowly(*given: Any, **named: Any) -> Any:
            entered.set()
            assert go.wait(10)
            return step(*given, **named)

        monkeypatch.setattr(target, name, take_slowly)
        task = bench.start_job(job)
        assert await asyncio.to_thread(entered.wait, 10)
        task.cancel()
        await asyncio.wait([task])
        assert bench.budget.held == 0
        go.set()
        await settle([bench.start(9)])
        assert bench.engine.values == [9]
        assert image._prepared is None


async def test_a_canvas_that_fails_ends_its_image_alone() -> None:
    async with open_bench() as bench:
        bad, good = await settle([bench.start(5, BAD, 6), bench.start(7)])
        assert isinstance(errors_of(bad)[0], EngineError)
        assert errors_of(good) == [None]
        assert [s.failed for s in bench.stats].count(True) == 1
        assert 6 not in bench.engine.values  # nobody needs it any more
        assert bench.budget.held == 0


async def test_an_image_that_cannot_be_decoded_is_an_error_of_its_own() -> None:
    async with open_bench() as bench:
        job = build_job(build_work(1), build_work(2))
        job.images[0]._file = type(job.images[0]._file)("broken.png", b"no image")
        (job,) = await settle([bench.start_job(job)])
        broken, good = errors_of(job)
        assert getattr(broken, "code", "") == "unsupported_format" and good is None
        assert bench.engine.values == [2] and bench.budget.held == 0


@pytest.mark.parametrize("factor", [0, 2])
async def test_a_wrong_number_of_results_is_an_engine_error(factor: int) -> None:
    async with open_bench() as bench:
        infer = bench.engine.infer
        bench.engine.infer = lambda tiles: infer(tiles) * factor  # type: ignore[method-assign]
        (job,) = await settle([bench.start(7)])
        assert isinstance(errors_of(job)[0], EngineError)
        assert bench.stats == [CallStats(1, failed=True, shown_px=16, padding_px=0)]


async def test_what_is_no_exception_ends_the_image_and_not_the_thread() -> None:
    async with open_bench() as bench:
        infer = bench.engine.infer

        def leave(tiles: Sequence[Tile]) -> list[Candidates]:
            if tiles[0].image[0, 0, 0] == 3:
                raise KeyboardInterrupt
            return infer(tiles)

        bench.engine.infer = leave  # type: ignore[method-assign]
        bad, good = await settle([bench.start(3), bench.start(4)])
        assert isinstance(errors_of(bad)[0], EngineError)
        assert errors_of(good) == [None]


@pytest.mark.parametrize("threads", [1, 2])
async def test_a_call_that_hangs_costs_its_image_and_another_thread_takes_over(
    threads: int,
) -> None:
    policy = Policy(threads=1, helpers=threads - 1, calls=threads)
    async with open_bench(policy, timeout_s=0.05) as bench:
        bench.engine.go.clear()
        hung, waits = bench.start(1, 2), bench.start(3)
        (job,) = await settle([hung])
        assert isinstance(errors_of(job)[0], EngineError)
        (job,) = await settle([waits])
        assert errors_of(job) == [None]
        assert 3 in bench.others[0].values
        failed = [stats.failed for stats in bench.stats]
        assert failed.count(True) in range(1, threads + 1) and failed.count(False) == 1
        bench.engine.go.set()  # the threads return, and do nothing more
        (job,) = await settle([bench.start(4)])
        assert errors_of(job) == [None]
        assert not set(bench.others[0].threads) & set(bench.engine.threads)


async def test_a_call_that_hangs_is_no_longer_counted_as_a_batch() -> None:
    async with open_bench(timeout_s=0.05) as bench:
        bench.engine.go.clear()
        (job,) = await settle([bench.start(1)])
        assert isinstance(errors_of(job)[0], EngineError)
        assert bench.scheduler._batches.calls == 0


async def test_a_helper_that_hangs_is_replaced_too() -> None:
    policy = Policy(threads=1, helpers=1, calls=2)
    async with open_bench(policy, timeout_s=0.5) as bench:
        bench.engine.go.clear()
        hung = bench.start(1, 2)
        await until(lambda: len(bench.engine.batches) == 2)
        await settle([hung])
        await until(lambda: len(bench.stats) == 2)
        together, engine = threading.Barrier(2, timeout=5), bench.others[0]
        infer = engine.infer

        def infer_together(tiles: Sequence[Tile]) -> list[Candidates]:
            together.wait()
            return infer(tiles)

        engine.infer = infer_together  # type: ignore[method-assign]
        (job,) = await settle([bench.start(3, 4, 5, 6)])
        assert errors_of(job) == [None]
        assert {thread.name for thread in engine.threads} == {"work", "help"}


@pytest.mark.parametrize("stage", ["search", "finish"])
@pytest.mark.parametrize("batch", [False, True])
async def test_a_failure_after_the_engine_ends_the_image_and_not_the_thread(
    stage: str, batch: bool
) -> None:
    async with open_bench(Policy(threads=1, batch=batch)) as bench:

        def fail(*given: object) -> None:
            raise ZeroDivisionError("of our own")

        bad = build_job(build_work(1, 2))
        setattr(bad.images[0], stage, fail)
        bad, good = await settle([bench.start_job(bad), bench.start(3)])
        assert isinstance(errors_of(bad)[0], ZeroDivisionError)
        assert errors_of(good) == [None]
        assert bench.budget.held == 0 and bench.scheduler._batches.calls == 0


async def test_why_an_engine_failed_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async with open_bench() as bench:
        await settle([bench.start(BAD)])
    assert caplog.text.count("the engine failed on a canvas: the engine does not like 250") == 1


async def test_draining_finishes_what_there_is_and_takes_nothing_more() -> None:
    async with open_bench() as bench:
        held = await bench.hold()
        waits = bench.start(2)
        await asyncio.sleep(0)
        drained = asyncio.create_task(bench.scheduler.drain())
        await asyncio.sleep(0.01)
        assert not drained.done()
        with pytest.raises(Draining):
            await bench.start(3)
        bench.engine.go.set()
        await drained
        assert [errors_of(job) for job in await settle([held, waits])] == [[None], [None]]


async def test_a_drain_that_is_given_up_leaves_the_requests_to_abort() -> None:
    async with open_bench() as bench:
        held = await bench.hold(1, 2)
        waits = bench.start(2)
        await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(bench.scheduler.drain(), 0.01)
        assert not any(task.done() for task in (held, waits))
        assert bench.budget.held > 0
        await bench.scheduler.abort()
        assert bench.budget.held == 0  # at once, before the callers go on
        for task in (held, waits):
            with pytest.raises(Draining):
                await task
        with pytest.raises(Draining):
            await bench.start(3)
        assert bench.budget.held == 0


@pytest.mark.parametrize("by", ["drain", "abort"])
async def test_threads_end_with_the_scheduler(by: str) -> None:
    def threads() -> set[threading.Thread]:
        return {t for t in threading.enumerate() if t.name in ("work", "help")}

    before = threads()
    async with open_bench(Policy(threads=2, helpers=1, calls=3)) as bench:
        await settle([bench.start(*range(1, 20)) for _ in range(4)])
        assert threads() - before
        await (bench.scheduler.drain() if by == "drain" else bench.scheduler.abort())
        await until(lambda: not threads() - before)
        assert bench.budget._callbacks == []


async def test_closing_the_engine_ends_the_waiting() -> None:
    async with open_bench() as bench:
        held = await bench.hold()
        bench.watched.close()
        (job,) = await settle([held])
        assert isinstance(errors_of(job)[0], EngineError)
        (job,) = await settle([bench.start(2)])
        assert isinstance(errors_of(job)[0], EngineError)
        with pytest.raises(BackendError):
            bench.watched.infer([], lambda: None)


async def test_what_nobody_waits_for_ends_with_the_engine_and_is_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with open_bench() as bench:
        held = await bench.hold()
        held.cancel()
        await asyncio.wait([held])
        await bench.scheduler.abort()
        bench.watched.close()
        bench.engine.go.set()
        await asyncio.to_thread(bench.scheduler.join, 10)
        assert not bench.scheduler._threads._running
    assert "the engine failed" not in caplog.text


async def test_a_cancelled_request_gives_the_pixels_of_each_image_back() -> None:
    """Two images are small, the sum of both would count as a large one."""
    budget = PixelBudget(800)
    async with open_bench(Policy(threads=4, calls=4), budget=budget) as bench:
        bench.engine.go.clear()
        job = build_job(build_work(1, 2, overlay=True), build_work(3, 4, overlay=True))
        task = bench.start_job(job)
        await until(lambda: budget.held == 64)
        task.cancel()
        await asyncio.wait([task])
        assert budget.held == 0
        assert all(budget.take(50, client) for client in "abcdefgh")


@pytest.mark.parametrize(("threads", "helpers"), [(3, 0), (2, 2)])
async def test_leaving_at_random_loses_no_thread_and_no_pixels(threads: int, helpers: int) -> None:
    async with open_bench(Policy(threads=threads, helpers=helpers, calls=4)) as bench:
        await leave_at_random(bench)
        await until(lambda: bench.budget.held == 0)
        assert bench.scheduler.waiting == 0
