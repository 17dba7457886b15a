"""Lanes: threads that each carry an image all the way, for engines that gain nothing from batches.

    decode -> each tile: engine, postprocess -> encode, in one thread

On a CPU an engine call of one canvas in one thread costs no more than its share of a larger call,
and every change of threads costs time. So an image keeps its thread; if it has several tiles, lanes
that are free take some of them. Images go in the order of their ranks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from pipeline.postprocess import TileCandidates
from pipeline.types import Tile
from service.engines.base import BackendError
from service.errors import Draining, EngineError
from service.models.watch import EngineHung, RestartingBackend
from service.observe.timing import Interval
from service.work.batcher import BatchStats
from service.work.pools import RankedPool
from service.work.steps import DecodedImage, TiledImage, timed

logger = logging.getLogger(__name__)

FAILED = "the engine failed on this image"
Decode = Callable[[], DecodedImage]
Build = Callable[[DecodedImage], TiledImage]


@dataclass(frozen=True)
class Carried:
    """An image that has been carried to its answer.

    Attributes:
        decoded: When it was decoded.
        calls: When the engine had its tiles.
        picture: With the answer.
    """

    decoded: Interval
    calls: list[Interval]
    picture: TiledImage


class Lanes:
    """Carries the images of one model; used from one event loop.

    Args:
        engine: As many lanes as it takes calls at once.
        images: Images begun at once; lanes beyond that only take tiles of those. Default: all.
        on_call: Told of every engine call, in the lane's thread.

    Attributes:
        max_batch: Canvases in a call.
    """

    max_batch = 1

    def __init__(
        self,
        engine: RestartingBackend,
        *,
        images: int | None = None,
        on_call: Callable[[BatchStats], None] = lambda stats: None,
    ) -> None:
        self._engine = engine
        self._on_call = on_call
        begun = min(images or engine.concurrency, engine.concurrency)
        self._pool = self._helpers = RankedPool(begun, "lane")
        if begun < engine.concurrency:
            self._helpers = RankedPool(engine.concurrency - begun, "helper")
        self._images: set[_Image] = set()
        self._draining = False

    @property
    def waiting(self) -> int:
        """Images that no lane has begun."""
        return sum(not image.has_begun for image in self._images)

    def start(self) -> None:
        """The threads begin with the first image."""

    async def carry(self, decode: Decode, build: Build, rank: float) -> Carried:
        """Carries an image; if the caller is cancelled, what has not been begun is left.

        Args:
            decode: Its first step.
            build: Makes the image of tiles.
            rank: Its place in the queue, lowest first.

        Raises:
            Draining: Nothing more is taken, or `abort` came.
            EngineError: The engine failed on one of its tiles.
            Exception: What a step raised.
        """
        if self._draining:
            raise Draining("the server is going down")
        done: asyncio.Future[Carried] = asyncio.get_running_loop().create_future()
        image = _Image(build, self._infer, self._share, rank, done)
        self._images.add(image)
        waiting = self._pool.submit(partial(image.begin, decode), rank)
        try:
            return await done
        finally:
            waiting.drop()
            image.is_left = True
            self._images.discard(image)

    async def drain(self) -> None:
        """Takes nothing more, finishes what there is, and ends the threads."""
        self._draining = True
        if self._images:
            await asyncio.wait([image.done for image in self._images])
        self._shut_down()

    async def abort(self) -> None:
        """Ends at once; whoever waits gets `Draining`."""
        self._draining = True
        for image in self._images:
            image.is_left = True
            if not image.done.done():
                image.done.set_exception(Draining("the server is going down"))
        self._shut_down()

    def _shut_down(self) -> None:
        for pool in {self._pool, self._helpers}:
            pool.shutdown()

    def _share(self, image: _Image, tiles: int) -> None:
        """Lets free lanes take part of an image's tiles; in a lane."""
        for _ in range(min(tiles, self._engine.concurrency) - 1):
            self._helpers.submit(image.go_on, image.rank)

    def _infer(self, image: _Image, tile: Tile) -> tuple[TileCandidates, Interval]:
        """One engine call, in a lane; if it hangs, another thread takes the lane's place."""
        lane, started_s = threading.current_thread(), time.monotonic()

        def give_up() -> None:
            image.fail(self._count_failure("it does not come back", started_s))
            if not self._pool.replace(lane):
                self._helpers.replace(lane)

        try:
            results = self._engine.infer_here([tile], give_up)
            if len(results) != 1:
                raise BackendError(f"1 canvas gave {len(results)} results")
        except EngineHung as error:  # it was given up
            raise EngineError(FAILED) from error
        except Exception as error:  # an engine's exceptions have no common base
            raise self._count_failure(error, started_s) from error
        ended_s = time.monotonic()
        self._on_call(BatchStats(1, ended_s - started_s, failed=False))
        return results[0], (started_s, ended_s)

    def _count_failure(self, reason: object, started_s: float) -> EngineError:
        self._on_call(BatchStats(1, time.monotonic() - started_s, failed=True))
        logger.error("the engine failed on a canvas: %s", reason)
        return EngineError(FAILED)


@dataclass(eq=False)
class _Image:
    """An image on its way.

    Attributes:
        is_left: Nobody waits for it: no lane goes on with it.
        has_begun: A lane has begun it.
    """

    build: Build
    infer: Callable[[_Image, Tile], tuple[TileCandidates, Interval]]
    share: Callable[[_Image, int], None]
    rank: float
    done: asyncio.Future[Carried]
    is_left: bool = False
    has_begun: bool = False
    _decoded: Interval = field(init=False)
    _picture: TiledImage = field(init=False)
    _calls: list[Interval] = field(default_factory=list)
    _next: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, decode: Decode) -> None:
        """Decodes it, and goes on; the first lane's part."""
        self.has_begun = True
        try:
            decoded = timed(decode)
            self._decoded, self._picture = decoded.ran, self.build(decoded.result)
            tiles = len(self._picture.tiles)
            if tiles > 1:
                self.share(self, tiles)
        except BaseException as error:  # nothing may end the lane
            self.fail(error)
        else:
            self.go_on()

    def go_on(self) -> None:
        """Takes one tile after another while there are any; who has the last one finishes."""
        try:
            while (index := self._take()) is not None:
                candidates, call = self.infer(self, self._picture.tiles[index])
                with self._lock:
                    self._calls.append(call)
                if self._picture.search(index, candidates):
                    carried = Carried(self._decoded, self._calls, self._picture)
                    self._tell(partial(self.done.set_result, carried))
        except BaseException as error:  # nothing may end the lane
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Ends it with an error; any thread may call it."""
        self.is_left = True
        self._tell(partial(self.done.set_exception, error))

    def _take(self) -> int | None:
        with self._lock:
            if self.is_left or self._next == len(self._picture.tiles):
                return None
            self._next += 1
            return self._next - 1

    def _tell(self, set_it: Callable[[], None]) -> None:
        def tell() -> None:
            if not self.done.done():
                set_it()

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.done.get_loop().call_soon_threadsafe(tell)
