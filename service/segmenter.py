"""The way of a request's images through pools and engine.

    headers -> admission -> decode (pool) -> batcher -> postprocess, encode (pool)

Every image is on its own: what fails fails for that image alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from service.admission import Admission
from service.batcher import BatchStats, DynamicBatcher
from service.errors import (
    ModelUnavailable,
    StartupError,
    UnknownModel,
    UnknownVersion,
    describe_error,
)
from service.metrics import Metrics
from service.pipeline.errors import DecodeError
from service.pipeline.merge import TileInstance
from service.pipeline.types import Tile
from service.registry import LoadedModel, Repository
from service.settings import Settings
from service.steps import (
    Options,
    Timed,
    count_pixels,
    decode,
    encode_error,
    find_in_tile,
    finish,
    timed,
)
from service.timing import Interval, Timing, attribute_time

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class ImageFile:
    """An image of a request, still encoded."""

    file_name: str | None
    data: bytes


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


@dataclass(frozen=True)
class ServedModel:
    """A model with its batcher."""

    loaded: LoadedModel
    batcher: DynamicBatcher

    @property
    def name(self) -> str:
        """The model's name."""
        return self.loaded.config.name


class Segmenter:
    """Serves the models of a repository; `start` it in the event loop, `drain` it at last.

    Args:
        settings: Bounds, threads and delays.
        repository: Loaded models; the segmenter closes them at the end.
        metrics: Where everything is counted.
    """

    def __init__(self, settings: Settings, repository: Repository, metrics: Metrics) -> None:
        self.repository = repository
        self.metrics = metrics
        self.admission = Admission(settings.max_queue_images, settings.max_queue_pixels)
        self._settings = settings
        self._models: Mapping[str, ServedModel] = {
            name: ServedModel(model, self._build_batcher(model))
            for name, model in repository.models.items()
        }
        # One pool would let decoding of what came later delay what is nearly finished.
        self._headers = ThreadPoolExecutor(1, thread_name_prefix="header")
        self._decoders = ThreadPoolExecutor(settings.pool_threads, thread_name_prefix="decode")
        self._finishers = ThreadPoolExecutor(settings.pool_threads, thread_name_prefix="finish")
        self._requests = 0
        self.default_model = self._choose_default()
        self._announce()

    def _choose_default(self) -> str:
        name = self._settings.default_model
        if name is None:
            return min(self._models)
        if name not in self._models and name not in self.repository.refused:
            raise StartupError(f"there is no default model {name!r}, only {sorted(self._models)}")
        return name

    def _build_batcher(self, model: LoadedModel) -> DynamicBatcher:
        name = model.config.name

        def count(stats: BatchStats) -> None:
            self.metrics.batch_size.labels(name).observe(stats.size)
            if stats.failed:
                self.metrics.engine_failures.labels(name).inc()

        return DynamicBatcher(
            model.backend,
            max_batch=min(self._settings.max_batch, model.config.limits.max_batch),
            max_delay_s=self._settings.max_delay_ms / 1000,
            on_batch=count,
        )

    def _announce(self) -> None:
        metrics, admission = self.metrics, self.admission
        metrics.watch_queue(lambda: admission.images, lambda: admission.pixels)
        metrics.in_flight_requests.set_function(lambda: self._requests)
        metrics.queue_limit_images.set(admission.max_images)
        metrics.queue_limit_pixels.set(admission.max_pixels)
        for name, model in self.repository.models.items():
            metrics.add_model(name, model.version, model.backend.name, model.backend.device)
        for name in self.repository.refused:
            metrics.model_refused.labels(name).set(1)

    @property
    def is_ready(self) -> bool:
        """Whether new work is taken."""
        return self.admission.is_open

    def start(self) -> None:
        """Starts the batchers; needs a running event loop."""
        for model in self._models.values():
            model.batcher.start()
        self.metrics.ready.set(1)

    def close_admission(self) -> None:
        """Refuses new work from now on; what was accepted goes on."""
        self.admission.close()
        self.metrics.ready.set(0)

    @contextmanager
    def track_request(self) -> Iterator[None]:
        """Counts a request as long as it is handled."""
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1

    async def finish_accepted(self) -> bool:
        """Refuses new work and waits, within the drain time-out, for what was accepted.

        Returns:
            Whether all of it was finished.
        """
        self.close_admission()
        deadline_s = time.monotonic() + self._settings.drain_timeout_s
        while self._requests and time.monotonic() < deadline_s:
            await asyncio.sleep(0.01)
        if self._requests:
            logger.error("%d requests were not finished in time", self._requests)
        return not self._requests

    async def drain(self) -> None:
        """Finishes accepted work, then frees the engines."""
        finished = await self.finish_accepted()
        for model in self._models.values():
            await (model.batcher.drain() if finished else model.batcher.abort())
        for pool in (self._headers, self._decoders, self._finishers):
            pool.shutdown(wait=False, cancel_futures=True)
        self.repository.close()

    def find_model(self, name: str | None, version: int | None) -> ServedModel:
        """The model that a request means.

        Args:
            name: None takes the default model.
            version: None takes the version that is served.

        Raises:
            UnknownModel: There is none of that name.
            ModelUnavailable: It was refused.
            UnknownVersion: It is not the version that is served.
        """
        if name is None:
            name = self.default_model
        if name in self.repository.refused:
            raise ModelUnavailable(f"model {name!r} was refused; see GET /v2/models")
        if name not in self._models:
            raise UnknownModel(f"there is no model {name!r}, only {sorted(self._models)}")
        model = self._models[name]
        if version not in (None, model.loaded.version):
            raise UnknownVersion(
                f"model {name!r} is served in version {model.loaded.version}, not {version}"
            )
        return model

    async def segment(
        self, model: ServedModel, images: Sequence[ImageFile], options: Options
    ) -> list[Outcome]:
        """Segments a request's images; cancelling it removes what still waits.

        Raises:
            Overloaded, TooManyImages, Draining: None of them was admitted.
        """
        began_s = asyncio.get_running_loop().time()
        data = [image.data for image in images]
        checked = await self._in_pool(
            self._headers, partial(count_pixels, data, self._settings.max_image_pixels)
        )
        pixels = [count for count in checked.result if isinstance(count, int)]
        try:
            with self.admission.admit(len(pixels), sum(pixels)):
                return await asyncio.gather(
                    *(
                        self._segment_one(model, image, header, options, began_s)
                        for image, header in zip(images, checked.result, strict=True)
                    )
                )
        except asyncio.CancelledError:
            self.metrics.cancelled_images.labels(model.name).inc(len(images))
            raise

    async def _segment_one(
        self,
        model: ServedModel,
        image: ImageFile,
        header: int | DecodeError,
        options: Options,
        began_s: float,
    ) -> Outcome:
        try:
            if isinstance(header, DecodeError):
                raise header
            return await self._run_stages(model, image, options, began_s)
        except Exception as error:
            status, detail = describe_error(error)
            if status == 500 and detail["code"] == "internal_error":
                logger.exception("an image failed")
            self.metrics.image_errors.labels(model.name, detail["code"]).inc()
            return Outcome(encode_error(image.file_name, error), error=error)

    async def _run_stages(
        self, model: ServedModel, image: ImageFile, options: Options, began_s: float
    ) -> Outcome:
        config = model.loaded.config
        decoded = await self._in_pool(
            self._decoders,
            partial(
                decode,
                image.data,
                config,
                self._settings.max_image_pixels,
                options,
                scaled=self._settings.scaled_decode,
            ),
        )
        prepared = decoded.result.prepared
        # Few tiles of an image are on their way at once: their masks are what takes memory.
        room = asyncio.Semaphore(2 * model.batcher.max_batch)
        tiles = await gather_or_cancel(
            self._run_tile(model, tile, prepared.image_hw, options, room) for tile in prepared.tiles
        )
        finished = await self._in_pool(
            self._finishers,
            partial(
                finish,
                image.file_name,
                decoded.result,
                [tile.result for tile, _ in tiles],
                config,
                options,
            ),
        )
        answer = finished.result
        timing = attribute_time(
            (began_s, asyncio.get_running_loop().time()),
            decode=[decoded.ran],
            infer=[call for _, calls in tiles for call in calls],
            postprocess=[*(tile.ran for tile, _ in tiles), answer.merged],
            encode=[answer.encoded],
        )
        self._count(model.name, timing, answer.instances)
        return Outcome(answer.payload, timing)

    async def _run_tile(
        self,
        model: ServedModel,
        tile: Tile,
        image_hw: tuple[int, int],
        options: Options,
        room: asyncio.Semaphore,
    ) -> tuple[Timed[list[TileInstance]], list[Interval]]:
        """One tile's instances, with when they were found and when the engine had the tile."""
        async with room:
            inferred = await model.batcher.infer([tile])
            step = partial(
                find_in_tile,
                tile,
                inferred.candidates[0],
                image_hw,
                model.loaded.config,
                options,
            )
            return await self._in_pool(self._finishers, step), inferred.calls

    def _count(self, name: str, timing: Timing, instances: int) -> None:
        self.metrics.images.labels(name).inc()
        self.metrics.instances.labels(name).inc(instances)
        for stage, seconds in vars(timing).items():
            self.metrics.stage_seconds.labels(name, stage).observe(seconds)

    async def _in_pool(self, pool: ThreadPoolExecutor, step: Callable[[], T]) -> Timed[T]:
        return await asyncio.get_running_loop().run_in_executor(pool, timed, step)


async def gather_or_cancel(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Like `asyncio.gather`, but when one fails the others are cancelled."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
