"""The scheduler without batches: an image keeps its thread; scheduling after every canvas."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from pipeline.types import Candidates, Tile
from service.engines.base import Backend, BackendError
from service.engines.watch import WatchedEngine
from service.errors import Draining, EngineError
from service.work.fair import BURST, BURST_CHARGE
from service.work.pixels import PixelBudget
from service.work.policy import Policy
from service.work.queue import Job, Pick
from service.work.scheduler import CallStats, Scheduler
from tests.support.canvases import BAD, FakeEngine, build_job, build_work


class Bench:
    """A scheduler with its engine; another engine replaces one that dies.

    Attributes:
        stats: Of every engine call.
    """

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        timeout_s: float = 10.0,
        budget: PixelBudget | None = None,
        replacement: Callable[[], FakeEngine] = FakeEngine,
    ) -> None:
        self.policy = policy or Policy(threads=1)
        self.engine = FakeEngine(self.policy.calls)
        self.others: list[FakeEngine] = []
        self.stats: list[CallStats] = []
        self.budget = budget or PixelBudget()

        def replace(reason: str) -> None:
            self.others.append(replacement())
            self.watched.swap(self.others[-1])

        self.watched = WatchedEngine(self.engine, self.probe, timeout_s=timeout_s, on_death=replace)
        self.scheduler = Scheduler(self.watched, self.policy, self.budget, self.stats.append)

    def probe(self, backend: Backend) -> None:
        """The engine is always alive."""

    def start(self, *values: int, client: str = "someone") -> asyncio.Task[Job]:
        return self.start_job(build_job(build_work(*values), client=client))

    def start_job(self, job: Job) -> asyncio.Task[Job]:
        async def run() -> Job:
            await self.scheduler.run(job)
            return job

        return asyncio.create_task(run())

    async def hold(self, *values: int, client: str = "someone") -> asyncio.Task[Job]:
        """Puts a canvas into the engine and keeps it there until `engine.go` is set."""
        self.engine.go.clear()
        task = self.start(*values or (1,), client=client)
        assert await asyncio.to_thread(self.engine.entered.wait, 10)
        return task

    async def close(self) -> None:
        self.engine.go.set()
        await self.scheduler.abort()
        self.watched.close()


@asynccontextmanager
async def open_bench(policy: Policy | None = None, **options: object) -> AsyncIterator[Bench]:
    bench = Bench(policy, **options)  # type: ignore[arg-type]
    try:
        yield bench
    finally:
        await bench.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def settle(tasks: Sequence[Awaitable[Job]]) -> list[Job]:
    return await asyncio.wait_for(asyncio.gather(*tasks), 20)


def errors_of(job: Job) -> list[Exception | None]:
    outcomes = [image.outcome for image in job.images]
    assert all(outcome is not None for outcome in outcomes)
    return [outcome.error for outcome in outcomes if outcome is not None]


async def leave_at_random(bench: Bench) -> None:
    """Many requests of three clients, some cancelled; those that follow are all answered."""
    for round_ in range(40):
        tasks = [bench.start(*range(1, 2 + n % 5), client=f"{n % 3}") for n in range(12)]
        for _ in range(round_ % 7):
            await asyncio.sleep(0)
        for task in tasks[round_ % 3 :: 2]:
            task.cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
    jobs = await settle([bench.start(1, 2, 3) for _ in range(6)])
    assert all(errors_of(job) == [None] for job in jobs)


async def test_an_image_keeps_its_thread() -> None:
    async with open_bench(Policy(threads=2, calls=2)) as bench:
        (job,) = await settle([bench.start(7)])
        assert errors_of(job) == [None]
        assert bench.engine.batches == [[7]]
        assert bench.stats == [CallStats(1, failed=False)]
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


@pytest.mark.parametrize(("threads", "helpers"), [(2, 0), (1, 1)])
async def test_idle_threads_take_canvases_of_an_image(threads: int, helpers: int) -> None:
    together = threading.Barrier(2, timeout=10)
    async with open_bench(Policy(threads=threads, helpers=helpers, calls=2)) as bench:
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
        assert not large.done()
        await settle([large])


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

        bench.scheduler._queue.pick = watch  # type: ignore[method-assign]
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


async def test_progress_is_corrected_when_an_image_has_fewer_canvases_than_admitted() -> None:
    async with open_bench() as bench:
        work = build_work(1, 2)
        work.canvases = 5
        (job,) = await settle([bench.start_job(build_job(work))])
        assert (job.progress.done, job.progress.canvases) == (2, 2)


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


async def test_a_request_that_leaves_while_its_image_is_decoded_keeps_no_pixels() -> None:
    async with open_bench() as bench:
        job = build_job(build_work(1, 2, 3))
        (image,) = job.images
        entered, go, decode = threading.Event(), threading.Event(), image.open

        def open_slowly() -> None:
            entered.set()
            assert go.wait(10)
            decode()

        image.open = open_slowly  # type: ignore[method-assign]
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
        assert bench.stats == [CallStats(1, failed=True)]


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
        held = await bench.hold()
        waits = bench.start(2)
        await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(bench.scheduler.drain(), 0.01)
        assert not any(task.done() for task in (held, waits))
        await bench.scheduler.abort()
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


@pytest.mark.parametrize(("threads", "helpers"), [(3, 0), (2, 2)])
async def test_leaving_at_random_loses_no_thread_and_no_pixels(threads: int, helpers: int) -> None:
    async with open_bench(Policy(threads=threads, helpers=helpers, calls=4)) as bench:
        await leave_at_random(bench)
        await until(lambda: bench.budget.held == 0)
        assert bench.scheduler.waiting == 0
