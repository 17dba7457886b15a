"""The scheduler with batches: buckets of one shape, delays, failures, limits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from pipeline.types import Candidates, Tile
from service.errors import Draining, EngineError
from service.work.batches import Canvas
from service.work.policy import Policy
from service.work.request import ImageFile
from service.work.scheduler import CallStats
from tests.support.canvases import BAD, build_config, build_job, build_work
from tests.support.scheduling import (
    Bench,
    errors_of,
    leave_at_random,
    open_bench,
    settle,
    until,
)
from tests.support.waiting import poll_until


def batches(
    max_batch: int = 4, max_delay_s: float = 0.01, *, threads: int = 3, calls: int = 1
) -> Policy:
    return Policy(
        threads=threads, calls=calls, batch=True, max_batch=max_batch, max_delay_s=max_delay_s
    )


def count_busy(bench: Bench) -> int:
    """Threads that do not wait for work."""
    with bench.scheduler._lock:
        crew = bench.scheduler._threads
        return len(crew._threads) - len(crew._idle)


def meet_before(together: threading.Barrier, step: Callable[..., None]) -> Callable[..., None]:
    """A step that begins when as many threads are about to take it."""

    def take_together(*given: Any) -> None:
        together.wait()
        step(*given)

    return take_together


async def test_canvases_of_different_requests_share_calls() -> None:
    async with open_bench(batches(max_delay_s=10)) as bench:
        jobs = await settle([bench.start(value) for value in range(1, 9)])
        assert all(errors_of(job) == [None] for job in jobs)
        assert [len(batch) for batch in bench.engine.batches] == [4, 4]
        assert bench.stats == [CallStats(4, failed=False, shown_px=64, padding_px=0)] * 2
        assert sorted(bench.engine.values) == list(range(1, 9))


async def test_the_next_call_comes_before_post_processing() -> None:
    async with open_bench(batches(1, 0.0)) as bench:
        job = build_job(build_work(1, 2))
        (image,) = job.images
        image.open()
        canvases = [
            Canvas(job, image, i, image.make_canvas(i)[0], time.monotonic()) for i in (0, 1)
        ]
        scheduler = bench.scheduler
        scheduler._batches.results.append(canvases[0])
        scheduler._batches.put(canvases[1])
        steps = [scheduler._next() for _ in range(3)]
        assert [step and step.func for step in steps] == [  # type: ignore[union-attr]
            scheduler._call_batch,
            scheduler._search,
            None,  # the call is still in flight
        ]


async def test_canvases_of_one_image_share_calls_in_order() -> None:
    async with open_bench(batches(max_delay_s=0.05, threads=2)) as bench:
        (job,) = await settle([bench.start(*range(1, 11))])
        outcome = job.images[0].outcome
        assert outcome is not None and outcome.canvases == 10
        assert [len(batch) for batch in bench.engine.batches] == [4, 4, 2]
        assert len(outcome.stages["infer"]) == 3
        calls = outcome.stages["infer"]
        assert outcome.engine_s == pytest.approx(sum(end - start for start, end in calls))


async def test_a_lone_canvas_goes_after_the_delay_and_not_before() -> None:
    async with open_bench(batches(100, 0.05)) as bench:
        started_s = time.monotonic()
        (job,) = await settle([bench.start(5)])
        assert errors_of(job) == [None]
        assert 0.05 <= time.monotonic() - started_s < 5


async def test_a_full_batch_does_not_wait() -> None:
    async with open_bench(batches(2, 1000.0)) as bench:
        await settle([bench.start(1), bench.start(2)])
        assert bench.engine.batches in ([[1, 2]], [[2, 1]])


async def test_shapes_never_mix_in_a_call() -> None:
    configs = [build_config(height, width) for height, width in ((4, 4), (4, 8), (8, 4))]
    async with open_bench(batches(3)) as bench:
        jobs = [build_job(build_work(1 + i, config=config)) for i, config in enumerate(configs * 5)]
        await settle([bench.start_job(job) for job in jobs])
        assert {shape[1:3] for shape in bench.engine.shapes} == {(4, 4), (4, 8), (8, 4)}
        assert max(shape[0] for shape in bench.engine.shapes) <= 3
        assert sorted(bench.engine.values) == list(range(1, 16))


async def test_a_rare_shape_is_not_starved_by_a_common_one() -> None:
    async with open_bench(batches(2, 0.0, threads=2)) as bench:
        held = await bench.hold()
        rare = bench.start_job(build_job(build_work(2, config=build_config(8, 8))))
        await until(lambda: bench.scheduler._batches.waiting == 1)
        common = [bench.start(value) for value in range(3, 9)]
        await until(lambda: bench.scheduler._batches.waiting == 4)
        bench.engine.go.set()
        await settle([held, rare, *common])
        assert bench.engine.batches[1] == [2]


async def test_a_bad_canvas_harms_only_itself() -> None:
    async with open_bench(batches(8, 10.0)) as bench:
        values = [1, 2, BAD, 4, 5, 6, 7, 8]
        jobs = await settle([bench.start(value) for value in values])
        found = [errors_of(job)[0] for job in jobs]
        assert isinstance(found[2], EngineError)
        assert [error for error in found if error is None] == [None] * 7
        assert bench.stats[0] == CallStats(8, failed=True, shown_px=128, padding_px=0)
        assert sorted((s.size, s.failed) for s in bench.stats[1:]) == [(1, False)] * 7 + [(1, True)]
        jobs = await settle([bench.start(value) for value in range(1, 9)])
        assert all(errors_of(job) == [None] for job in jobs)


async def test_a_bad_tile_fails_its_image_and_removes_its_other_tiles() -> None:
    async with open_bench(batches(1, 0.0, threads=2)) as bench:
        (job,) = await settle([bench.start(BAD, *range(1, 21))])
        assert isinstance(errors_of(job)[0], EngineError)
        await until(lambda: bench.scheduler._batches.calls == 0)
        assert len(bench.engine.batches) <= 5
        (job,) = await settle([bench.start(1)])
        assert errors_of(job) == [None]


async def test_images_that_cannot_be_decoded_take_no_room_from_others() -> None:
    async with open_bench(batches(1, 0.0)) as bench:
        jobs = []
        for _ in range(9):  # more than are created ahead
            job = build_job(build_work(1))
            job.images[0]._file = ImageFile(None, b"no image")
            jobs.append(bench.start_job(job))
        for job in await settle(jobs):
            assert getattr(errors_of(job)[0], "code", "") == "unsupported_format"
        assert bench.scheduler._batches.preparing == 0
        (job,) = await settle([bench.start(2)])
        assert errors_of(job) == [None]


async def test_a_call_that_hangs_is_counted_as_failed() -> None:
    async with open_bench(batches(1, 0.0), timeout_s=0.05) as bench:
        bench.engine.go.clear()
        await settle([bench.start(1)])
        assert bench.stats == [CallStats(1, failed=True, shown_px=16, padding_px=0)]


async def test_a_wrong_number_of_results_is_an_engine_error() -> None:
    async with open_bench(batches(2)) as bench:
        infer = bench.engine.infer
        bench.engine.infer = lambda tiles: infer(tiles)[:-1]  # type: ignore[method-assign]
        jobs = await settle([bench.start(1), bench.start(2)])
        assert all(isinstance(errors_of(job)[0], EngineError) for job in jobs)


async def test_cancelled_work_is_removed_and_never_runs() -> None:
    async with open_bench(batches(4, 0.0)) as bench:
        held = await bench.hold()
        waiting = [bench.start(value) for value in range(2, 102)]
        await until(lambda: bench.scheduler._batches.waiting == 8)  # twice a batch, no more
        for task in waiting[:90]:
            task.cancel()
        await asyncio.gather(*waiting[:90], return_exceptions=True)
        assert bench.scheduler.waiting == 11
        bench.engine.go.set()
        await settle([held, *waiting[90:]])
        assert sorted(bench.engine.values) == [1, *range(92, 102)]


async def test_results_of_a_batch_are_post_processed_side_by_side() -> None:
    together = threading.Barrier(2, timeout=5)
    async with open_bench(batches(2, 1000.0)) as bench:
        jobs = [build_job(build_work(value)) for value in (1, 2)]
        for job in jobs:
            (image,) = job.images
            image.search = meet_before(together, image.search)  # type: ignore[method-assign]
        bench.engine.go.clear()
        tasks = [bench.start_job(job) for job in jobs]
        await until(lambda: bench.engine.batches and count_busy(bench) == 1)
        bench.engine.go.set()
        await settle(tasks)
        assert [errors_of(job) for job in jobs] == [[None], [None]]


async def test_all_threads_create_canvases_when_a_batch_makes_room() -> None:
    together = threading.Barrier(3, timeout=5)
    async with open_bench(batches(3, 0.0, threads=4)) as bench:
        held = await bench.hold()
        waiting = [bench.start(value) for value in range(2, 8)]
        await until(lambda: bench.scheduler._batches.waiting == 6)
        jobs = [build_job(build_work(value)) for value in (8, 9, 10)]
        for job in jobs:
            (image,) = job.images
            image.open = meet_before(together, image.open)  # type: ignore[method-assign]
        waiting += [bench.start_job(job) for job in jobs]
        await until(lambda: bench.scheduler.waiting == 10 and count_busy(bench) == 1)
        infer = bench.engine.infer

        def hold_again(tiles: Sequence[Tile]) -> list[Candidates]:
            bench.engine.go.clear()
            return infer(tiles)

        bench.engine.infer = hold_again  # type: ignore[method-assign]
        bench.engine.go.set()
        await until(lambda: len(bench.engine.batches) == 2)
        await until(lambda: together.broken or bench.scheduler._batches.waiting == 6)
        assert not together.broken
        bench.engine.infer = infer  # type: ignore[method-assign]
        bench.engine.go.set()
        assert all(errors_of(job) == [None] for job in await settle([held, *waiting]))


async def test_canvases_of_a_failed_batch_run_side_by_side(
    caplog: pytest.LogCaptureFixture,
) -> None:
    together = threading.Barrier(2, timeout=5)
    async with open_bench(batches(2, 1000.0, calls=2)) as bench:
        infer = bench.engine.infer

        def infer_alone(tiles: Sequence[Tile]) -> list[Candidates]:
            if len(tiles) > 1:
                poll_until(lambda: count_busy(bench) == 1, timeout_s=10, pause_s=0.001)
                raise RuntimeError("too many for the memory")
            together.wait()
            return infer(tiles)

        bench.engine.infer = infer_alone  # type: ignore[method-assign]
        jobs = await settle([bench.start(1), bench.start(2)])
        assert [errors_of(job) for job in jobs] == [[None], [None]]
    assert "a batch of 2 failed, its canvases run one by one: too many for the" in caplog.text


async def test_work_cancelled_in_the_engine_leaves_the_others_alone() -> None:
    async with open_bench(batches(2, 10.0)) as bench:
        bench.engine.go.clear()
        tasks = [bench.start(value) for value in (1, 2)]
        assert await asyncio.to_thread(bench.engine.entered.wait, 10)
        tasks[0].cancel()
        await asyncio.sleep(0)
        bench.engine.go.set()
        (job,) = await settle([tasks[1]])
        assert errors_of(job) == [None] and tasks[0].cancelled()


async def test_draining_runs_what_waits_without_delay() -> None:
    async with open_bench(batches(100, 1000.0)) as bench:
        waiting = [bench.start(value) for value in range(1, 6)]
        await until(lambda: bench.scheduler._batches.waiting == 5)
        await asyncio.wait_for(bench.scheduler.drain(), 10)
        assert all(errors_of(job) == [None] for job in await settle(waiting))
        with pytest.raises(Draining):
            await bench.start(1)


async def test_abort_answers_all_who_wait() -> None:
    async with open_bench(batches()) as bench:
        held = await bench.hold()
        waiting = [bench.start(value) for value in range(1, 6)]
        await asyncio.sleep(0)
        await bench.scheduler.abort()
        found = await asyncio.gather(held, *waiting, return_exceptions=True)
        assert all(isinstance(error, Draining) for error in found)
        assert bench.budget.held == 0


@pytest.mark.parametrize("calls", [1, 2, 3])
async def test_the_engine_gets_as_many_calls_as_it_takes(calls: int) -> None:
    async with open_bench(batches(1, 0.0, threads=calls + 2, calls=calls)) as bench:
        bench.engine.go.clear()
        tasks = [bench.start(value) for value in range(1, 13)]
        await until(lambda: len(bench.engine.batches) == calls)
        await until(lambda: bench.scheduler._batches.waiting == 2 * calls)
        await asyncio.sleep(0.01)
        assert len(bench.engine.batches) == calls
        bench.engine.go.set()
        assert all(errors_of(job) == [None] for job in await settle(tasks))


async def test_no_more_canvases_are_created_than_two_calls_need() -> None:
    async with open_bench(batches(2, 0.0, threads=4)) as bench:
        held = await bench.hold()
        large = bench.start(*[9] * 200)
        await until(lambda: bench.scheduler._batches.waiting == 4)
        await asyncio.sleep(0.01)
        assert bench.scheduler._batches.waiting == 4
        bench.engine.go.set()
        await settle([held, large])


async def test_canvases_are_created_while_the_engine_has_others() -> None:
    async with open_bench(batches(2, 0.0, threads=3)) as bench:
        held = await bench.hold()
        large = bench.start(*[9] * 20)
        await until(lambda: bench.scheduler._batches.waiting == 4)
        step = asyncio.Event()
        loop, infer = asyncio.get_running_loop(), bench.engine.infer

        def hold_again(tiles: Sequence[Tile]) -> list[Candidates]:
            bench.engine.go.clear()
            loop.call_soon_threadsafe(step.set)
            return infer(tiles)

        bench.engine.infer = hold_again  # type: ignore[method-assign]
        bench.engine.go.set()
        await asyncio.wait_for(step.wait(), 10)
        await until(lambda: bench.scheduler._batches.waiting == 4)  # two were taken
        bench.engine.infer = infer  # type: ignore[method-assign]
        bench.engine.go.set()
        await settle([held, large])


async def test_a_small_image_does_not_wait_for_a_large_one() -> None:
    async with open_bench(batches(2, 0.0)) as bench:
        large = await bench.hold(*[9] * 200, client="ann")
        await until(lambda: bench.scheduler._batches.waiting == 4)
        small = bench.start(1, 2, 3, 4, client="bob")
        await asyncio.sleep(0)
        bench.engine.go.set()
        await settle([small])
        assert bench.engine.values.index(4) <= 1 + 4 + 2 * 4 + 2
        await settle([large])
        assert bench.engine.values[-100:] == [9] * 100


async def test_a_batch_that_hangs_runs_one_by_one_on_the_next_engine() -> None:
    async with open_bench(batches(2, 10.0), timeout_s=0.05) as bench:
        bench.engine.go.clear()
        jobs = await settle([bench.start(1), bench.start(2)])
        assert [errors_of(job) for job in jobs] == [[None], [None]]
        assert bench.others[0].batches in ([[1], [2]], [[2], [1]])
        assert bench.scheduler._batches.calls == 0
        bench.engine.go.set()
        await until(lambda: bench.scheduler._batches.calls == 0)


async def test_a_canvas_that_hangs_alone_is_given_up() -> None:
    async with open_bench(batches(1, 0.0), timeout_s=0.05) as bench:
        bench.engine.go.clear()
        (job,) = await settle([bench.start(1)])
        assert isinstance(errors_of(job)[0], EngineError)
        (job,) = await settle([bench.start(2)])
        assert errors_of(job) == [None]
        assert bench.scheduler._batches.calls == 0


async def test_results_are_post_processed_before_more_calls() -> None:
    """The memory of a batch is bound to its results."""
    async with open_bench(batches(1, 0.0, threads=1)) as bench:
        infer, waiting = bench.engine.infer, []

        def watch(tiles: Sequence[Tile]) -> list[Candidates]:
            waiting.append(len(bench.scheduler._batches.results))
            return infer(tiles)

        bench.engine.infer = watch  # type: ignore[method-assign]
        await settle([bench.start(*range(1, 20))])
        assert max(waiting) == 0


async def test_leaving_at_random_loses_no_thread_and_no_pixels() -> None:
    async with open_bench(batches(3, 0.001, threads=4, calls=2)) as bench:
        await leave_at_random(bench)
        await until(lambda: bench.budget.held == 0 and bench.scheduler._batches.calls == 0)
