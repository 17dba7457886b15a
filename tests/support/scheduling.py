"""A scheduler with an engine that tests can hold, and requests for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from service.engines.base import Backend
from service.engines.watch import WatchedEngine
from service.work.pixels import PixelBudget
from service.work.policy import Policy
from service.work.queue import Job
from service.work.scheduler import CallStats, Scheduler
from tests.support.canvases import FakeEngine, build_job, build_work


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
