"""Dynamic batching: canvases of one shape wait a moment for company and share an engine call.

    infer(tiles) -> one bucket for each canvas shape -> a full bucket, or one in which a canvas
    has waited `max_delay_s`, goes to the engine's thread -> each canvas gets its own result

Lower ranks go first; among equal ranks those that came first.

The canvas follows from the image alone, so a result does not depend on who shared the batch.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from pipeline.postprocess import TileCandidates
from pipeline.types import Tile
from service.engines.base import Backend, BackendError
from service.errors import Draining, EngineError
from service.observe.timing import Interval
from service.work.pools import RankedPool

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class BatchStats:
    """One engine call, for whoever counts.

    Attributes:
        size: Canvases in it.
        infer_s: How long it took.
        failed: Whether it raised.
    """

    size: int
    infer_s: float
    failed: bool


@dataclass(frozen=True)
class Inferred:
    """What an image's tiles became.

    Attributes:
        candidates: One entry a tile, in their order.
        calls: When the engine had its tiles: each call once.
    """

    candidates: list[TileCandidates]
    calls: list[Interval]


@dataclass(frozen=True)
class _Done:
    candidates: TileCandidates
    call: Interval


@dataclass(eq=False)
class _Item:
    """A canvas that waits."""

    tile: Tile
    rank: float
    arrived_s: float
    done: asyncio.Future[_Done] = field(repr=False)


def _get_rank(item: _Item) -> float:
    return item.rank


class DynamicBatcher:
    """Feeds one engine from one event loop; `start` it first, `drain` it at last.

    Args:
        backend: The engine; `backend.concurrency` threads of the batcher's own call it.
        max_batch: Most canvases in a call.
        max_delay_s: How long a canvas waits for company while the engine is idle.
        on_batch: Told of every engine call.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        max_batch: int,
        max_delay_s: float,
        on_batch: Callable[[BatchStats], None] = lambda stats: None,
    ) -> None:
        if max_batch < 1 or max_delay_s < 0:
            raise ValueError(f"max_batch {max_batch} or max_delay_s {max_delay_s} is out of range")
        self._backend = backend
        self.max_batch = max_batch
        self.max_delay_s = max_delay_s
        self._on_batch = on_batch
        self._buckets: dict[Shape, list[_Item]] = {}
        self._changed = asyncio.Event()
        self._engine = RankedPool(backend.concurrency, "engine")
        self._slots = asyncio.Semaphore(backend.concurrency)
        self._draining = False
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Canvases that are not in the engine yet."""
        return sum(len(bucket) for bucket in self._buckets.values())

    def start(self) -> None:
        """Starts feeding the engine; needs a running event loop."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="batcher")

    async def infer(self, tiles: Sequence[Tile], rank: float = 0.0) -> Inferred:
        """Runs an image's tiles, in company if there is any; those of lower rank go first.

        If the caller is cancelled, or one of the tiles fails, the tiles that still wait are
        removed.

        Raises:
            Draining: The batcher takes nothing more.
            EngineError: The engine failed on one of the tiles, also when the tile was alone.
        """
        if self._draining:
            raise Draining("the server is going down")
        loop = asyncio.get_running_loop()
        arrived_s = loop.time()
        items = [_Item(tile, rank, arrived_s, loop.create_future()) for tile in tiles]
        for item in items:
            bucket = self._buckets.setdefault(item.tile.image.shape, [])
            bisect.insort(bucket, item, key=_get_rank)
        self._changed.set()
        try:
            if len(items) == 1:
                done = [await items[0].done]
            else:
                done = await asyncio.gather(*(item.done for item in items))
        except BaseException:
            self._remove(items)
            raise
        return Inferred(
            [result.candidates for result in done], sorted({result.call for result in done})
        )

    async def drain(self) -> None:
        """Takes nothing more, runs what waits without delay, and ends the engine's thread."""
        self._draining = True
        self._changed.set()
        if self._task is not None:
            await self._task
        self._engine.shutdown()

    async def abort(self) -> None:
        """Ends at once; whoever waits gets `Draining`."""
        self._draining = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._dismiss(itertools.chain.from_iterable(self._buckets.values()))
        self._buckets.clear()
        self._engine.shutdown()

    @staticmethod
    def _dismiss(items: Iterable[_Item]) -> None:
        for item in items:
            if not item.done.done():
                item.done.set_exception(Draining("the server is going down"))

    def _remove(self, items: Sequence[_Item]) -> None:
        for item in items:
            if not item.done.done():
                item.done.cancel()
            elif not item.done.cancelled():
                item.done.exception()  # seen; a second failed tile is no news
        for shape in {item.tile.image.shape for item in items}:
            bucket = self._buckets.get(shape)
            if bucket is not None:
                self._buckets[shape] = [i for i in bucket if not i.done.done()]
                if not self._buckets[shape]:
                    del self._buckets[shape]

    async def _run(self) -> None:
        """Gives the engine one batch after another, as many at once as it takes."""
        async with asyncio.TaskGroup() as calls:
            while True:
                # A batch is closed no sooner than it can go: until then it may grow.
                await self._slots.acquire()
                batch = await self._next_batch()
                if batch is None:
                    return
                calls.create_task(self._execute_and_free(batch))

    async def _execute_and_free(self, batch: list[_Item]) -> None:
        try:
            await self._execute(batch)
        except asyncio.CancelledError:
            self._dismiss(batch)
            raise
        except Exception as error:  # whatever happens, nobody waits for ever
            logger.exception("a batch was lost")
            for item in batch:
                self._fail(item, error)
        finally:
            self._slots.release()

    async def _next_batch(self) -> list[_Item] | None:
        """Waits for a batch that may go; None when drained."""
        loop = asyncio.get_running_loop()
        while True:
            self._changed.clear()
            now_s = loop.time()
            ripe = [shape for shape in self._buckets if self._is_ripe(shape, now_s)]
            if ripe:
                return self._take(min(ripe, key=self._lowest_rank))
            if self._draining and not self._buckets:
                return None
            timeout_s = None
            if self._buckets:
                timeout_s = min(map(self._oldest_s, self._buckets)) + self.max_delay_s - now_s
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), timeout_s)

    def _lowest_rank(self, shape: Shape) -> tuple[float, float]:
        first = self._buckets[shape][0]
        return first.rank, first.arrived_s

    def _oldest_s(self, shape: Shape) -> float:
        return min(item.arrived_s for item in self._buckets[shape])

    def _is_ripe(self, shape: Shape, now_s: float) -> bool:
        full = len(self._buckets[shape]) >= self.max_batch
        return full or self._draining or now_s >= self._oldest_s(shape) + self.max_delay_s

    def _take(self, shape: Shape) -> list[_Item]:
        bucket = self._buckets[shape]
        batch, rest = bucket[: self.max_batch], bucket[self.max_batch :]
        if rest:
            self._buckets[shape] = rest
        else:
            del self._buckets[shape]
        return batch

    async def _execute(self, batch: list[_Item]) -> None:
        """Runs a batch; if the engine raises, its canvases run again one by one."""
        error = await self._call(batch)
        if error is None:
            return
        if len(batch) == 1:
            self._fail(batch[0], error)
            return
        logger.warning("a batch of %d failed, its canvases run one by one: %s", len(batch), error)
        for item in batch:
            if not item.done.done():
                alone = await self._call([item])
                if alone is not None:
                    self._fail(item, alone)

    async def _call(self, batch: list[_Item]) -> Exception | None:
        """One engine call; scatters its results, or returns what it raised."""
        started_s = time.monotonic()
        try:
            step = partial(self._backend.infer, [item.tile for item in batch])
            results = await self._engine.run(step, batch[0].rank)
            if len(results) != len(batch):
                raise BackendError(f"{len(batch)} canvases gave {len(results)} results")
        except Exception as error:  # an engine's exceptions have no common base
            self._on_batch(BatchStats(len(batch), time.monotonic() - started_s, failed=True))
            return error
        call = (started_s, time.monotonic())
        self._on_batch(BatchStats(len(batch), call[1] - call[0], failed=False))
        for item, candidates in zip(batch, results, strict=True):
            if not item.done.done():
                item.done.set_result(_Done(candidates, call))
        return None

    @staticmethod
    def _fail(item: _Item, error: Exception) -> None:
        if not item.done.done():
            logger.error("the engine failed on a canvas that was alone: %s", error)
            item.done.set_exception(EngineError("the engine failed on this image"))
