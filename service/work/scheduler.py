"""The scheduler of one model: which canvas is processed next, by which thread, in which batch.

After every canvas the queue is consulted again (iteration-level scheduling):

    clients, fair -> requests of the client, interactive before batch -> images -> canvases

Background work (jobs) has its turn when no client has a canvas to process.

Canvases are created one at a time from the decoded image. With `Policy.batch` they wait in buckets
of one shape, up to `max_delay_s`, and share engine calls; without, a thread takes each canvas from
its pixels to its instances.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from pipeline.types import Tile
from service.engines.base import BackendError
from service.engines.watch import EngineHung, WatchedEngine
from service.errors import Draining, EngineError
from service.work.batches import Batches, Canvas
from service.work.crew import Crew
from service.work.image import ImageWork
from service.work.pixels import PixelBudget
from service.work.policy import Policy
from service.work.queue import Job, WorkQueue
from service.work.request import Outcome

logger = logging.getLogger(__name__)

FAILED = "the engine failed on this image"


@dataclass(frozen=True)
class CallStats:
    """One engine call.

    Attributes:
        size: Canvases in it.
        failed: Whether it raised or exceeded its time.
        shown_px: Pixels of the images on its canvases.
        padding_px: Other pixels of its canvases.
    """

    size: int
    failed: bool
    shown_px: int
    padding_px: int


def _describe_call(canvases: Sequence[Canvas], *, failed: bool) -> CallStats:
    tiles = [canvas.tile for canvas in canvases]
    shown = sum(tile.valid_hw[0] * tile.valid_hw[1] for tile in tiles)
    whole = sum(tile.image.shape[0] * tile.image.shape[1] for tile in tiles)
    return CallStats(len(tiles), failed, shown, whole - shown)


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
        self._batches = Batches()
        self._threads = Crew("work", self._lock, self._next, policy.threads)
        self._helpers = Crew("help", self._lock, self._next_help, policy.helpers)
        self._jobs: set[Job] = set()
        self._finished: list[Job] = []
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

    def join(self, timeout_s: float) -> None:
        """After `drain` or `abort`: waits for the threads, each of which may be in a step."""
        for crew in (self._threads, self._helpers):
            crew.join(timeout_s)

    def _remove(self, job: Job) -> None:
        with self._lock:
            freed = self._queue.remove(job)
            self._wake_for_background()
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

    def _wake_for_background(self) -> None:
        """Has a thread look for background work, which may have waited for an image; locked."""
        if self._queue.has_background:
            self._threads.wake()

    # --- what a thread does next; the lock is held -------------------------------------------

    def _next(self) -> Callable[[], None] | float | None:
        batches, policy = self._batches, self.policy
        if batches.buckets or batches.retry:  # first of all, so that the engine is never idle
            batch = batches.take(policy, at_once=self._draining)
            if batch:
                if self._queue:  # threads that found no room for more canvases
                    self._threads.wake(len(batch))
                return partial(self._call_batch, batch)
        if batches.results:
            return partial(self._search, batches.results.popleft())
        if not policy.batch:
            picked = self._queue.pick()
            return (
                batches.seconds_until_ripe(policy)
                if picked is None
                else partial(self._carry, *picked)
            )
        ahead = batches.waiting + batches.preparing
        # Background work does not fill the calls that other canvases will need.
        may_wait = ahead < policy.max_batch
        picked = self._queue.pick(background=may_wait) if ahead < policy.max_ahead else None
        if picked is None:
            return batches.seconds_until_ripe(policy)
        batches.preparing += 1
        return partial(self._prepare, *picked)

    def _next_help(self) -> Callable[[], None] | None:
        picked = self._queue.pick_active()
        return None if picked is None else partial(self._carry, *picked)

    # --- the steps --------------------------------------------------------------------------

    def _carry(self, job: Job, image: ImageWork, index: int) -> None:
        """Takes one canvas from its pixels to its instances, in this thread."""
        try:
            tile = self._make_canvas(job, image, index)
            canvas = Canvas(job, image, index, tile, time.monotonic())
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
        canvas = Canvas(job, image, index, tile, time.monotonic())
        with self._lock:
            self._batches.preparing -= 1
            self._batches.put(canvas)

    def _make_canvas(self, job: Job, image: ImageWork, index: int) -> Tile:
        if index == 0:
            admitted = image.canvases
            image.open(self.policy.canvases)
            with self._lock:
                job.progress.canvases -= admitted - image.canvases
                more = self._queue.opened(job, image)
                if more:
                    self._threads.wake(more)
                    self._helpers.wake(more)
                self._wake_for_background()
            if job.skips(image):  # the request was dropped meanwhile, and with it the pixels
                image.drop()
        tile, is_freed = image.make_canvas(index)
        if is_freed:
            with self._lock:
                freed = self._queue.release(image)
            self._release(job, freed)
        return tile

    def _call_batch(self, batch: Sequence[Canvas]) -> None:
        try:
            self._infer(batch, is_batch=True)
        except EngineHung:
            return  # `_give_up` has dealt with the canvases
        except BaseException as error:
            with self._lock:
                self._batches.failed(batch)
            self._split(batch, error)
            return
        with self._lock:
            self._batches.returned(batch)
            self._threads.wake(len(batch))

    def _infer(self, canvases: Sequence[Canvas], *, is_batch: bool) -> None:
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
            self._on_call(_describe_call(canvases, failed=True))
            if len(canvases) == 1:
                raise _report(error) from error
            raise
        call = started_s, time.monotonic()
        for canvas, candidates in zip(canvases, results, strict=True):
            canvas.candidates, canvas.call, canvas.share = candidates, call, 1 / len(canvases)
        self._on_call(_describe_call(canvases, failed=False))

    def _give_up(
        self, canvases: Sequence[Canvas], thread: threading.Thread, is_batch: bool
    ) -> None:
        """A call has exceeded its time: its thread may never return. Any thread may call this."""
        self._on_call(_describe_call(canvases, failed=True))
        if is_batch:
            with self._lock:
                self._batches.failed(canvases)
        try:  # first, so that no thread takes further canvases of an image that has failed
            self._split(canvases, BackendError("the call exceeded its time"))
        finally:
            with self._lock:
                if not self._threads.replace(thread):
                    self._helpers.replace(thread)

    def _split(self, canvases: Sequence[Canvas], error: BaseException) -> None:
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
        if canvas.job.skips(canvas.image):  # nobody waits for it, as when the engine is closed
            return
        if not isinstance(error, EngineError):
            error = _report(error)
        self._fail(canvas.job, canvas.image, error)

    def _search(self, canvas: Canvas) -> None:
        try:
            self._finish_canvas(canvas)
        except BaseException as error:
            self._fail(canvas.job, canvas.image, error)
        finally:
            with self._lock:
                self._batches.searched(canvas)

    def _finish_canvas(self, canvas: Canvas) -> None:
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
            self._wake_for_background()
            if is_done:
                self._finished.append(job)
            is_first = is_done and len(self._finished) == 1
        self._release(job, freed)
        if is_first:  # otherwise the event loop has been woken and will see this request too
            try:
                job.done.get_loop().call_soon_threadsafe(self._tell)
            except RuntimeError:  # the loop is closed
                self._take_finished()

    def _tell(self) -> None:
        """Wakes the callers of `run` whose requests are finished; runs in the event loop."""
        for job in self._take_finished():
            if not job.done.done():
                job.done.set_result(None)

    def _take_finished(self) -> list[Job]:
        with self._lock:
            finished, self._finished = self._finished, []
        return finished


def _report(error: BaseException) -> EngineError:
    """Logs why the engine failed on a canvas; the error that its image gets."""
    logger.error("the engine failed on a canvas: %s", error)
    return EngineError(FAILED)
