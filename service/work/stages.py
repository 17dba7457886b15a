"""The way of one image through pools and engine.

    headers -> decode (pool) -> batcher -> postprocess, encode (pool)

or, where batches gain nothing,

    headers -> a lane, which does all of it

Every image is on its own: what fails fails for that image alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from pipeline.errors import DecodeError
from pipeline.types import UInt8
from service.errors import describe_error
from service.models.repository import LoadedModel
from service.models.watch import RestartingBackend
from service.observe.metrics import Metrics
from service.observe.timing import Interval, Timing, attribute_time
from service.observe.tracing import note_image
from service.settings import Settings
from service.work.batcher import DynamicBatcher
from service.work.lanes import Build, Carried, Decode, Lanes
from service.work.pools import RankedPool
from service.work.steps import (
    Options,
    TiledImage,
    count_pixels,
    decode,
    encode_error,
    peek,
    timed,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class ImageFile:
    """An image of a request.

    Attributes:
        file_name: As the client calls it.
        data: The file's bytes, still encoded; or pixels, [H, W, 3] uint8 RGB.
    """

    file_name: str | None
    data: bytes | UInt8


@dataclass(frozen=True)
class Outcome:
    """What became of one image.

    Attributes:
        payload: Its entry of `results` as JSON, or a PNG if a picture was asked for and nothing
            failed.
        timing: None if it failed.
        error: Why it failed.
    """

    payload: bytes
    timing: Timing | None = None
    error: Exception | None = None


@dataclass(eq=False)
class ServedModel:
    """A model with its engine, which is watched.

    Attributes:
        feeder: Gives the engine its canvases.
        users: Requests that have it in use.
    """

    loaded: LoadedModel
    engine: RestartingBackend
    feeder: DynamicBatcher | Lanes
    users: int = 0

    @property
    def name(self) -> str:
        """The model's name."""
        return self.loaded.config.name


@dataclass(frozen=True)
class Job:
    """What the images of one request have in common.

    Attributes:
        model: Who segments them.
        options: What the request asks for.
        began_s: When it came, on the event loop's clock.
        rank: Its place in every queue, lowest first.
    """

    model: ServedModel
    options: Options
    began_s: float
    rank: float


class Stages:
    """The pools, and an image's way through them; `shutdown` at last.

    Args:
        settings: Threads and bounds.
        metrics: Where everything is counted.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        # One pool would let decoding of what came later delay what is nearly finished.
        self._headers = RankedPool(1, "header")
        self._decoders = RankedPool(settings.pool_threads, "decode")
        self._finishers = RankedPool(settings.pool_threads, "finish")

    def shutdown(self) -> None:
        """Ends the threads; what waits is dropped."""
        for pool in (self._headers, self._decoders, self._finishers):
            pool.shutdown()

    async def read_headers(self, images: Sequence[ImageFile], job: Job) -> list[int | DecodeError]:
        """Pixels of each image, or why it is refused; nothing is decoded yet.

        Most are known at once; a header that must be parsed could hold the event loop.
        """
        data = [image.data for image in images]
        most = self._settings.max_image_pixels
        counts = [pixels for one in data if (pixels := peek(one)) is not None and pixels <= most]
        if len(counts) == len(data):
            return [*counts]
        return await self._headers.run(partial(count_pixels, data, most), job.rank)

    async def run(self, image: ImageFile, header: int | DecodeError, job: Job) -> Outcome:
        """One image from its bytes to its answer; cancelling it removes what still waits."""
        try:
            if isinstance(header, DecodeError):
                raise header
            return await self._run(image, header, job)
        except Exception as error:
            status, detail = describe_error(error)
            if status == 500 and detail["code"] == "internal_error":
                logger.exception("an image failed")
            self._metrics.image_errors.labels(job.model.name, detail["code"]).inc()
            return Outcome(encode_error(image.file_name, error), error=error)

    async def _run(self, image: ImageFile, pixels: int, job: Job) -> Outcome:
        model, options = job.model, job.options
        config = model.loaded.config
        step = partial(
            decode,
            image.data,
            config,
            pixels,  # no more than was admitted
            options,
            scaled=self._settings.scaled_decode,
        )
        build = partial(TiledImage, image.file_name, config=config, options=options)
        if isinstance(model.feeder, Lanes):
            carried = await model.feeder.carry(step, build, job.rank)
        else:
            carried = await self._hand_over(step, build, model.feeder, job.rank)
        answer = carried.picture.answer
        assert answer is not None
        whole = (job.began_s, time.monotonic())
        stages = {
            "decode": [carried.decoded],
            "infer": carried.calls,
            "postprocess": [*carried.picture.searched, answer.merged],
            "encode": [answer.encoded],
        }
        timing = attribute_time(whole, **stages)
        note_image(model.name, whole, stages)
        self._count(model.name, timing, answer.instances)
        return Outcome(answer.payload, timing)

    async def _hand_over(
        self, decode: Decode, build: Build, batcher: DynamicBatcher, rank: float
    ) -> Carried:
        """From pool to batcher to pool."""
        decoded = await self._decoders.run(partial(timed, decode), rank)
        picture = build(decoded.result)
        # Few tiles of an image are on their way at once: their masks are what takes memory.
        room = asyncio.Semaphore(2 * batcher.max_batch)
        calls = await gather_or_cancel(
            self._run_tile(picture, index, batcher, rank, room)
            for index in range(len(picture.tiles))
        )
        return Carried(decoded.ran, [call for of_tile in calls for call in of_tile], picture)

    async def _run_tile(
        self,
        picture: TiledImage,
        index: int,
        batcher: DynamicBatcher,
        rank: float,
        room: asyncio.Semaphore,
    ) -> list[Interval]:
        """Finds one tile's instances; when the engine had the tile."""
        async with room:
            inferred = await batcher.infer([picture.tiles[index]], rank)
            (candidates,) = inferred.candidates
            await self._finishers.run(partial(picture.search, index, candidates), rank)
            return inferred.calls

    def _count(self, name: str, timing: Timing, instances: int) -> None:
        self._metrics.images.labels(name).inc()
        self._metrics.instances.labels(name).inc(instances)
        for stage, seconds in vars(timing).items():
            self._metrics.stage_seconds.labels(name, stage).observe(seconds)


async def gather_or_cancel(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Like `asyncio.gather`, but when one fails the others are cancelled."""
    todo = list(work)
    if len(todo) == 1:
        return [await todo[0]]  # most requests have one image, and a task costs
    tasks = [asyncio.ensure_future(one) for one in todo]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
