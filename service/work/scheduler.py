"""The scheduler of one model: which canvas is processed next, by which thread, in which batch.

After every canvas the queue is consulted again (iteration-level scheduling):

    clients, fair -> requests of the client, interactive before batch -> images -> canvases

Canvases are created one at a time from the decoded image. With `Policy.batch` they wait in buckets
of one shape, up to `max_delay_s`, and share engine calls; without, a thread takes each canvas from
its pixels to its instances.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from pipeline.postprocess import TileCandidates
from pipeline.types import Tile
from service.engines.base import BackendError
from service.engines.watch import EngineHung, WatchedEngine
from service.errors import Draining, EngineError
from service.observe.timing import Interval
from service.work.crew import Crew
from service.work.image import ImageWork
from service.work.pixels import PixelBudget
from service.work.queue import Job, WorkQueue
from service.work.request import Outcome

logger = logging.getLogger(__name__)

FAILED = "the engine failed on this image"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Policy:
    """How a scheduler uses its engine.

    Attributes:
        threads: Threads that decode, call the engine and post-process.
        helpers: Further threads that only take canvases of images that are being processed.
        calls: Engine calls at once.
        batch: Whether canvases of different images share engine calls.
        max_batch: Canvases in a call.
        max_delay_s: How long a canvas waits for others of its shape.
    """

    threads: int
    helpers: int = 0
    calls: int = 1
    batch: bool = False
    max_batch: int = 1
    max_delay_s: float = 0.0

    def __post_init__(self) -> None:
        least = min(self.threads, self.calls, self.max_batch)
        if least < 1 or self.helpers < 0 or self.max_delay_s < 0:
            raise ValueError(f"{self} is out of range")


@dataclass(frozen=True)
class CallStats:
    """One engine call.

    Attributes:
        size: Canvases in it.
        failed: Whether it raised or exceeded its time.
    """

    size: int
    failed: bool


@dataclass(eq=False)
class _Canvas:
    """A canvas on its way through a batch.

    Attributes:
        ready_s: When it was created.
    """

    job: Job
    image: ImageWork
    index: int
    tile: Tile
    ready_s: float
    candidates: TileCandidates | None = None
    call: Interval = (0.0, 0.0)
    share: float = 1.0


@dataclass(eq=False)
class _Batches:
    """Canvases before and after the engine.

    Attributes:
        preparing: Canvases that threads are creating.
        buckets: Created, by shape, oldest first.
        retry: Of batches that failed; each runs alone.
        results: Not post-processed yet.
        calls: Engine calls in flight.
    """

    preparing: int = 0
    buckets: dict[Shape, list[_Canvas]] = field(default_factory=dict)
    retry: deque[_Canvas] = field(default_factory=deque)
    results: deque[_Canvas] = field(default_factory=deque)
    calls: int = 0

    @property
    def waiting(self) -> int:
        """Canvases that wait for an engine call."""
        return len(self.retry) + sum(map(len, self.buckets.values()))


class Scheduler:
    """Schedules the canvases of one model; `run` is called from one event loop.

    Args:
        engine: The model's.
        policy: How it is used.
        budget: Bounds the decoded images in memory; shared between models.
        on_call: Called after every engine call, in the calling thread.
    """

    def __init__(
        self,
        engine: WatchedEngine,
        policy: Policy,
        budget: PixelBudget | None = None,
        on_call: Callable[[CallStats], None] = lambda stats: None,
    ) -> None:
        self.policy = policy
        self._engine = engine
        self._on_call = on_call
        self._lock = threading.Lock()
        self._queue = WorkQueue(budget or PixelBudget())
        self._batches = _Batches()
        self._threads = Crew("work", self._lock, self._next, policy.threads)
        self._helpers = Crew("help", self._lock, self._next_help, policy.helpers)
        self._jobs: set[Job] = set()
        self._draining = False
        self._queue.budget.on_release(self._wake)

    @property
    def waiting(self) -> int:
        """Canvases in flight that are not finished."""
        return sum(job.progress.canvases - job.progress.done for job in tuple(self._jobs))

    def adopt(self, policy: Policy) -> None:
        """Changes the policy; what is in flight goes on."""
        with self._lock:
            self.policy = policy
            self._threads.resize(policy.threads)
            self._helpers.resize(policy.helpers)

    async def run(self, job: Job) -> None:
        """Processes a request's images; each gets its outcome.

        If the caller is cancelled, its work stops after the canvases that threads are processing.

        Raises:
            Draining: The scheduler takes no more work, or `abort` was called.
        """
        if self._draining:
            raise Draining("the server is going down")
        self._jobs.add(job)
        with self._lock:
            self._queue.add(job)
            self._threads.wake(len(job.images))
        try:
            await job.done
        finally:
            self._jobs.discard(job)
            self._remove(job)

    async def drain(self) -> None:
        """Takes no more work, finishes what is in flight and ends the threads."""
        self._draining = True
        self._wake()  # a batch that waits for its delay is due
        if self._jobs:
            await asyncio.wait([job.done for job in self._jobs])
        self._stop()

    async def abort(self) -> None:
        """Ends at once; callers of `run` get `Draining`."""
        self._draining = True
        for job in tuple(self._jobs):
            self._remove(job)
            if not job.done.done():
                job.done.set_exception(Draining("the server is going down"))
        self._stop()

    def _remove(self, job: Job) -> None:
        with self._lock:
            freed = self._queue.remove(job)
        for pixels in freed:
            self._release(job, pixels)

    def _release(self, job: Job, pixels: int) -> None:
        """Gives decoded pixels back to the budget; the lock must not be held."""
        if pixels:
            self._queue.budget.release(pixels, job.client.name)

    def _stop(self) -> None:
        self._queue.budget.forget(self._wake)
        with self._lock:
            self._threads.stop()
            self._helpers.stop()

    def _wake(self) -> None:
        with self._lock:
            self._threads.wake()

    # --- what a thread does next; the lock is held -------------------------------------------

    def _next(self) -> Callable[[], None] | float | None:
        batches, policy = self._batches, self.policy
        if batches.results:
            return partial(self._search, batches.results.popleft())
        if batches.buckets or batches.retry:
            batch = self._take_batch()
            if batch:
                if self._queue:  # threads that found no room for more canvases
                    self._threads.wake(len(batch))
                return partial(self._call_batch, batch)
        if not policy.batch:
            picked = self._queue.pick()
            return self._seconds_until_ripe() if picked is None else partial(self._carry, *picked)
        ahead = batches.waiting + batches.preparing
        picked = self._queue.pick() if ahead < 2 * policy.max_batch * policy.calls else None
        if picked is None:
            return self._seconds_until_ripe()
        batches.preparing += 1
        return partial(self._prepare, *picked)

    def _next_help(self) -> Callable[[], None] | None:
        picked = self._queue.pick_active()
        return None if picked is None else partial(self._carry, *picked)

    def _take_batch(self) -> list[_Canvas]:
        """The canvases of the next engine call; empty if none may start."""
        batches, policy = self._batches, self.policy
        if batches.calls >= policy.calls:
            return []
        if len(batches.results) >= 2 * policy.max_batch * policy.calls:
            return []  # their memory must be released first
        batch: list[_Canvas] = []
        while batches.retry and not batch:
            batch = [c for c in [batches.retry.popleft()] if not c.job.skips(c.image)]
        now_s = time.monotonic()
        while not batch and (ripe := [b for b in batches.buckets.values() if self._ripe(b, now_s)]):
            bucket = min(ripe, key=lambda canvases: canvases[0].ready_s)
            taken = bucket[: policy.max_batch]
            del bucket[: policy.max_batch]
            if not bucket:
                del batches.buckets[taken[0].tile.image.shape]
            batch = [canvas for canvas in taken if not canvas.job.skips(canvas.image)]
        batches.calls += bool(batch)
        return batch

    def _ripe(self, bucket: Sequence[_Canvas], now_s: float) -> bool:
        is_full = len(bucket) >= self.policy.max_batch
        return is_full or self._draining or now_s >= bucket[0].ready_s + self.policy.max_delay_s

    def _seconds_until_ripe(self) -> float | None:
        """Seconds until a batch may start; None: only the end of a call allows another."""
        batches = self._batches
        if not batches.buckets or batches.calls >= self.policy.calls:
            return None
        first_s = min(bucket[0].ready_s for bucket in batches.buckets.values())
        return max(0.0, first_s + self.policy.max_delay_s - time.monotonic())

    # --- the steps --------------------------------------------------------------------------

    def _carry(self, job: Job, image: ImageWork, index: int) -> None:
        """Takes one canvas from its pixels to its instances, in this thread."""
        try:
            tile = self._make_canvas(job, image, index)
            canvas = _Canvas(job, image, index, tile, time.monotonic())
            self._infer([canvas], is_batch=False)
            self._finish_canvas(canvas)
        except BaseException as error:  # whatever it is, the request ends
            self._fail(job, image, error)

    def _prepare(self, job: Job, image: ImageWork, index: int) -> None:
        """Creates a canvas and puts it into its bucket."""
        try:
            tile = self._make_canvas(job, image, index)
        except BaseException as error:
            with self._lock:
                self._batches.preparing -= 1
            self._fail(job, image, error)
            return
        canvas = _Canvas(job, image, index, tile, time.monotonic())
        with self._lock:
            self._batches.preparing -= 1
            self._batches.buckets.setdefault(tile.image.shape, []).append(canvas)

    def _make_canvas(self, job: Job, image: ImageWork, index: int) -> Tile:
        if index == 0:
            admitted = image.canvases
            image.open()
            with self._lock:
                job.progress.canvases -= admitted - image.canvases
                more = self._queue.opened(job, image)
                if more:
                    self._threads.wake(more)
                    self._helpers.wake(more)
        tile, is_freed = image.make_canvas(index)
        if is_freed:
            with self._lock:
                freed = self._queue.release(image)
            self._release(job, freed)
        return tile

    def _call_batch(self, batch: Sequence[_Canvas]) -> None:
        try:
            self._infer(batch, is_batch=True)
        except EngineHung:
            return  # `_give_up` has dealt with the canvases
        except BaseException as error:
            with self._lock:
                self._batches.calls -= 1
            self._split(batch, error)
            return
        with self._lock:
            self._batches.calls -= 1
            self._batches.results.extend(batch)
            self._threads.wake(len(batch))

    def _infer(self, canvases: Sequence[_Canvas], *, is_batch: bool) -> None:
        """One engine call; sets the candidates of the canvases.

        Raises:
            EngineHung: The call exceeded its time; `_give_up` was called meanwhile.
            Exception: What the engine raised.
        """
        started_s = time.monotonic()
        give_up = partial(self._give_up, canvases, threading.current_thread(), is_batch)
        try:
            results = self._engine.infer([canvas.tile for canvas in canvases], give_up)
            if len(results) != len(canvases):
                raise BackendError(f"{len(canvases)} canvases gave {len(results)} results")
        except EngineHung:
            raise
        except Exception as error:
            self._on_call(CallStats(len(canvases), failed=True))
            if len(canvases) == 1:
                logger.error("the engine failed on a canvas: %s", error)
                raise EngineError(FAILED) from error
            raise
        call = started_s, time.monotonic()
        for canvas, candidates in zip(canvases, results, strict=True):
            canvas.candidates, canvas.call, canvas.share = candidates, call, 1 / len(canvases)
        self._on_call(CallStats(len(canvases), failed=False))

    def _give_up(
        self, canvases: Sequence[_Canvas], thread: threading.Thread, is_batch: bool
    ) -> None:
        """A call has exceeded its time: its thread may never return. Any thread may call this."""
        self._on_call(CallStats(len(canvases), failed=True))
        with self._lock:
            self._batches.calls -= is_batch
            if not self._threads.replace(thread):
                self._helpers.replace(thread)
        self._split(canvases, BackendError("the call exceeded its time"))

    def _split(self, canvases: Sequence[_Canvas], error: BaseException) -> None:
        """Runs the canvases of a failed call one by one; a single one has failed."""
        if len(canvases) > 1:
            logger.warning(
                "a batch of %d failed, its canvases run one by one: %s", len(canvases), error
            )
            with self._lock:
                self._batches.retry.extend(canvases)
                self._threads.wake(len(canvases))
            return
        (canvas,) = canvases
        if not isinstance(error, EngineError):
            logger.error("the engine failed on a canvas: %s", error)
            error = EngineError(FAILED)
        self._fail(canvas.job, canvas.image, error)

    def _search(self, canvas: _Canvas) -> None:
        try:
            self._finish_canvas(canvas)
        except BaseException as error:
            self._fail(canvas.job, canvas.image, error)

    def _finish_canvas(self, canvas: _Canvas) -> None:
        """Post-processes a canvas; after the last one of an image, writes the image's answer."""
        job, image, candidates = canvas.job, canvas.image, canvas.candidates
        assert candidates is not None
        canvas.candidates = None
        if job.skips(image):
            return
        image.search(canvas.index, canvas.tile, candidates, canvas.call, canvas.share)
        with self._lock:
            is_last = self._queue.searched(job, image)
        if is_last:
            self._finish(job, image, image.finish(job.progress.began_s))

    def _fail(self, job: Job, image: ImageWork, error: BaseException) -> None:
        """Ends an image with an error; any thread may call it."""
        known = error if isinstance(error, Exception) else EngineError(f"{FAILED}: {error!r}")
        self._finish(job, image, image.fail(known))

    def _finish(self, job: Job, image: ImageWork, outcome: Outcome) -> None:
        with self._lock:
            is_done, freed = self._queue.finish(job, image, outcome)
        self._release(job, freed)
        if is_done:
            self._tell(job)

    @staticmethod
    def _tell(job: Job) -> None:
        """Wakes the event loop, once for a request."""

        def tell() -> None:
            if not job.done.done():
                job.done.set_result(None)

        with contextlib.suppress(RuntimeError):  # the loop is closed
            job.done.get_loop().call_soon_threadsafe(tell)
