"""The scheduler without batches: an image keeps its thread; scheduling after every canvas."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import pytest

from pipeline.types import Candidates, Tile
from service.errors import EngineError
from service.work.fair import BURST, BURST_CHARGE
from service.work.pixels import PixelBudget
from service.work.policy import Policy
from service.work.queue import Job, Pick
from service.work.scheduler import CallStats
from tests.support.canvases import BAD, build_job, build_work
from tests.support.scheduling import errors_of, open_bench, settle, until
from tests.support.waiting import poll_until


def have_outcomes(jobs: Sequence[Job]) -> bool:
    return all(image.outcome is not None for job in jobs for image in job.images)


async def test_an_image_keeps_its_thread() -> None:
    async with open_bench(Policy(threads=2, calls=2)) as bench:
        (job,) = await settle([bench.start(7)])
        assert errors_of(job) == [None]
        assert bench.engine.batches == [[7]]
        assert bench.stats == [CallStats(1, failed=False, shown_px=16, padding_px=0)]
        (thread,) = set(bench.engine.threads)
        assert thread.name == "work" and thread is not threading.current_thread()
        outcome = job.images[0].outcome
        assert outcome is not None and outcome.timing is not None
        (decoded, _), (call,) = outcome.stages["decode"], outcome.stages["infer"]
        assert decoded[0] <= decoded[1] <= call[0] <= call[1]


@pytest.mark.parametrize(("threads", "helpers"), [(1, 0), (2, 0), (3, 0), (1, 2), (1, 1)])
async def test_every_canvas_is_processed_once(threads: int, helpers: int) -> None:
    policy = Policy(threads=threads, helpers=helpers, calls=threads + helpers)
    async with open_bench(policy) as bench:
        counts = (1, 2, 7, 30, 1)
        jobs = await settle([bench.start(*range(1, 1 + n)) for n in counts])
        assert [job.images[0].outcome.canvases for job in jobs] == list(counts)  # type: ignore[union-attr]
        assert [job.progress.done for job in jobs] == list(counts)
        assert sorted(bench.engine.values) == sorted(v for n in counts for v in range(1, 1 + n))
        assert bench.scheduler.waiting == 0 and bench.budget.held == 0


@pytest.mark.parametrize("adopted", [False, True])
@pytest.mark.parametrize(("threads", "helpers"), [(2, 0), (1, 1)])
async def test_idle_threads_take_canvases_of_an_image(
    threads: int, helpers: int, adopted: bool
) -> None:
    policy = Policy(threads=threads, helpers=helpers, calls=2)
    together = threading.Barrier(2, timeout=10)
    async with open_bench(Policy(threads=1) if adopted else policy) as bench:
        bench.scheduler.adopt(policy)
        infer = bench.engine.infer

        def infer_together(tiles: Sequence[Tile]) -> list[Candidates]:
            together.wait()
            return infer(tiles)

        bench.engine.infer = infer_together  # type: ignore[method-assign]
        (job,) = await settle([bench.start(1, 2, 3, 4)])
        assert errors_of(job) == [None]


async def test_a_helper_opens_no_image() -> None:
    async with open_bench(Policy(threads=1, helpers=1, calls=2)) as bench:
        held = await bench.hold()
        waits = bench.start(2)
        await asyncio.sleep(0.02)
        assert bench.engine.values == [1] and bench.scheduler.waiting == 2
        bench.engine.go.set()
        await settle([held, waits])


async def test_images_of_one_request_are_all_answered() -> None:
    async with open_bench(Policy(threads=2, calls=2)) as bench:
        job = build_job(build_work(1), build_work(2, BAD, 3), build_work(4, 5))
        (job,) = await settle([bench.start_job(job)])
        first, bad, last = errors_of(job)
        assert first is None and last is None and isinstance(bad, EngineError)


async def test_a_small_image_does_not_wait_for_a_large_one() -> None:
    """Head of line: the queue is consulted after every canvas, also for one client."""
    async with open_bench() as bench:
        large = await bench.hold(*[9] * 200, client="a")
        small = [bench.start(1, 2, 3, 4, client=client) for client in ("a", "b")]
        await asyncio.sleep(0)
        bench.engine.go.set()
        await settle(small)
        between = bench.engine.values.index(4) + 1
        assert between <= 1 + 2 * 4 * 2  # both small ones, and no more of the large one
        await settle([large])
        assert bench.engine.values[-100:] == [9] * 100


async def test_two_clients_that_wait_all_the_time_are_served_alike() -> None:
    """The bound of service.work.fair, for what two threads are given."""
    bound = BURST * (1 - BURST_CHARGE) + 2
    async with open_bench(Policy(threads=2, calls=2)) as bench:
        given: list[str] = []
        pick = bench.scheduler._queue.pick

        def watch() -> Pick | None:
            picked = pick()
            if picked is not None:
                given.append(picked[0].client.name)
            return picked

        bench.scheduler._queue.pick = watch  # type: ignore[assignment, method-assign]
        held = await bench.hold(*[1] * 240, client="ann")
        other = [bench.start(*[2] * 240, client="bob") for _ in range(4)]
        await asyncio.sleep(0)
        before = len(given)
        bench.engine.go.set()
        await settle([held, *other])
        assert given.count("ann") == 240 and given.count("bob") == 960
        last = len(given) - given[::-1].index("ann")
        difference, differences = 0, [0]
        for name in given[before:last]:  # while both wait
            difference += 1 if name == "ann" else -1
            differences.append(difference)
        assert len(differences) > 400
        assert max(differences) - min(differences) <= bound


async def test_progress_counts_finished_canvases() -> None:
    async with open_bench() as bench:
        held = await bench.hold(1, 2, 3)
        job = next(iter(bench.scheduler._jobs))
        assert (job.progress.done, job.progress.canvases) == (0, 3)
        bench.engine.go.set()
        await settle([held])
        assert (job.progress.done, job.progress.canvases) == (3, 3)


async def test_requests_that_finish_while_the_event_loop_is_busy_wake_it_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with open_bench(Policy(threads=2, calls=2)) as bench:
        loop, woken = asyncio.get_running_loop(), list[object]()
        call_soon = loop.call_soon_threadsafe

        def watch(callback: Callable[[], object]) -> object:
            woken.append(callback)
            return call_soon(callback)

        monkeypatch.setattr(loop, "call_soon_threadsafe", watch)
        for _ in range(2):
            woken.clear()
            jobs = [build_job(build_work(1, 2), build_work(3)) for _ in range(5)]
            tasks = [bench.start_job(job) for job in jobs]
            await asyncio.sleep(0)  # the requests are queued; from here on the loop is busy
            poll_until(partial(have_outcomes, jobs), timeout_s=10, pause_s=0.001)
            poll_until(lambda: bool(woken), timeout_s=10, pause_s=0.001)
            assert len(woken) == 1 and not any(task.done() for task in tasks)
            await settle(tasks)


async def test_a_request_whose_event_loop_has_ended_keeps_no_other_from_its_answer() -> None:
    async with open_bench() as bench:
        ended = asyncio.new_event_loop()
        job = build_job(build_work(1))
        job.done = ended.create_future()
        ended.close()
        scheduler = bench.scheduler
        with scheduler._lock:
            scheduler._queue.add(job)
            scheduler._threads.wake()
        await until(lambda: job.images[0].outcome)
        (other,) = await settle([bench.start(2)])
        assert errors_of(other) == [None]


async def test_canvases_that_are_finished_do_not_wait_any_more() -> None:
    async with open_bench() as bench:
        infer, permits = bench.engine.infer, threading.Semaphore(0)

        def infer_when_let(tiles: Sequence[Tile]) -> list[Candidates]:
            assert permits.acquire(timeout=10)
            return infer(tiles)

        bench.engine.infer = infer_when_let  # type: ignore[method-assign]
        task = bench.start(1, 2, 3)
        await until(lambda: bench.scheduler.waiting == 3)
        permits.release(2)
        await until(lambda: bench.scheduler.waiting == 1)
        permits.release()
        await settle([task])
        assert bench.scheduler.waiting == 0


async def test_progress_is_corrected_when_an_image_has_fewer_canvases_than_admitted() -> None:
    async with open_bench() as bench:
        work = build_work(1, 2)
        work.canvases = 5
        (job,) = await settle([bench.start_job(build_job(work))])
        assert (job.progress.done, job.progress.canvases) == (2, 2)


async def test_a_policy_is_changed_while_it_works() -> None:
    async with open_bench() as bench:
        held = await bench.hold(*range(1, 30))
        bench.scheduler.adopt(Policy(threads=3, calls=1, batch=True, max_batch=4))
        others = [bench.start(100 + value) for value in range(9)]
        await until(lambda: bench.scheduler._batches.waiting >= 4)
        bench.engine.go.set()
        jobs = await settle([held, *others])
        assert all(errors_of(job) == [None] for job in jobs)
        assert max(map(len, bench.engine.batches)) > 1
        bench.scheduler.adopt(Policy(threads=1))
        (job,) = await settle([bench.start(*range(1, 9))])
        assert errors_of(job) == [None]
        assert [len(batch) for batch in bench.engine.batches[-8:]] == [1] * 8


async def test_images_of_one_client_do_not_keep_an_image_of_another_waiting() -> None:
    """The budget holds 8 of the images; each has 20 canvases, which take turns."""
    async with open_bench(budget=PixelBudget(2 * 8 * 320)) as bench:
        infer = bench.engine.infer

        def infer_slowly(tiles: Sequence[Tile]) -> list[Candidates]:
            time.sleep(0.001)
            return infer(tiles)

        bench.engine.infer = infer_slowly  # type: ignore[method-assign]
        many = [bench.start(*[1] * 20, client="many") for _ in range(12)]
        await until(lambda: len(bench.engine.batches) > 20)
        before = len(bench.engine.batches)
        await settle([bench.start(9, client="other")])
        assert bench.engine.values.index(9) - before < 40  # not the 141 of 8 images
        await settle(many)
        assert bench.budget.held == 0


async def test_images_wait_encoded_until_pixels_are_given_back() -> None:
    """Two schedulers share a budget that holds one image."""
    budget = PixelBudget(16)
    async with open_bench(budget=budget) as one, open_bench(budget=budget) as other:
        held = await one.hold(1, 2)
        waits = other.start(3, 4)
        await asyncio.sleep(0.02)
        assert other.engine.values == [] and budget.held == 32
        one.engine.go.set()
        await settle([held, waits])
        assert other.engine.values == [3, 4] and budget.held == 0


async def test_background_work_never_stops_for_good() -> None:
    """Whatever becomes of the requests beside it: done, cancelled while decoded, or refused."""
    async with open_bench(Policy(threads=2)) as bench:
        slow = build_job(*[build_work(1, 2, 3) for _ in range(30)], client="jobs")
        slow.priority = "background"
        running = bench.start_job(slow)
        for round_ in range(60):
            task = bench.start(*range(1, 2 + round_ % 4), client=f"{round_ % 3}")
            for _ in range(round_ % 5):
                await asyncio.sleep(0)
            if round_ % 3:
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        (job,) = await settle([running])
        assert errors_of(job) == [None] * 30
