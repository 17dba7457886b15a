"""The segmenter of one process: admission, and the schedulers of the served models."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import cv2

from pipeline.decode import check_size
from pipeline.errors import DecodeError
from pipeline.model_config import ModelConfig
from service.cores import count_cores
from service.errors import ServiceError, describe_error, drop_frames
from service.models.repository import Repository
from service.models.served import ServedModel
from service.models.store import ModelStore
from service.models.watcher import RepositoryWatcher
from service.observe.metrics import Metrics
from service.observe.tracing import note_image
from service.protocol import ModelState, Segmented
from service.settings import Settings
from service.work.admission import Admission
from service.work.image import HW, ImageWork, count_cost, fail, peek_size, read_image_header
from service.work.pixels import PixelBudget
from service.work.queue import Job
from service.work.request import ClientProfile, ImageFile, Outcome, RequestOptions, RequestProgress

logger = logging.getLogger(__name__)


class LocalSegmenter:
    """Serves the models of a repository; `start` it in the event loop, `drain` it at last.

    Implements `Segmenter`, whose methods are documented there.

    Args:
        settings: Bounds, threads and delays.
        repository: Loaded models; the segmenter closes them at the end.
        metrics: Where everything is counted.

    Attributes:
        store: What is served.
    """

    def __init__(self, settings: Settings, repository: Repository, metrics: Metrics) -> None:
        self.metrics = metrics
        self.admission = Admission(settings.max_queue_canvases)
        self.store = ModelStore(
            settings, repository, metrics, PixelBudget(settings.max_decoded_pixels)
        )
        self._settings = settings
        self._watcher = RepositoryWatcher(self.store, repository.stamps, metrics)
        self._polling: asyncio.Task[None] | None = None
        # OpenCV knows no quotas of cgroup v2, and counts hyper-threads.
        cv2.setNumThreads(min(cv2.getNumThreads(), count_cores()))
        metrics.watch(self.admission)

    @property
    def is_ready(self) -> bool:
        """Whether new work is admitted, and there are models whose engines all answer."""
        models = self.store.all_models
        is_usable = self.admission.is_open and self.failure is None and bool(models)
        return is_usable and all(model.engine.is_alive for model in models)

    @property
    def failure(self) -> str | None:
        """Why the process must be replaced."""
        return self.store.renewal.failure

    @property
    def models(self) -> list[ModelState]:
        """What is served, by name and version."""
        return [model.state for model in self.store.all_models]

    @property
    def unavailable(self) -> dict[str, str]:
        """Why other models, or newer versions of served ones, are not served; by name."""
        return self.store.unavailable

    @property
    def default_model(self) -> str | None:
        """Name of the model of requests that name none; None if such requests are refused."""
        return self.store.default_model

    def start(self) -> None:
        """Starts rebuilding engines and, if asked for, watching the repository."""
        self.store.start()
        if self._settings.model_poll_s:
            poll = self._watcher.poll(self._settings.model_poll_s)
            self._polling = asyncio.get_running_loop().create_task(poll, name="poll")
        self.metrics.follow(self.metrics.ready, lambda: self.is_ready)

    def find(self, name: str | None, version: int | None) -> ModelState:
        """The model that a request means."""
        return self.store.find(name, version).state

    @contextmanager
    def use(
        self, name: str | None, version: int | None, client: ClientProfile
    ) -> Iterator[ServedModel]:
        """The model that a request means; it stays until the request is answered."""
        with self.store.use(name, version) as model, self.admission.request(client):
            yield model

    async def segment(
        self,
        model: ServedModel,
        images: Sequence[ImageFile],
        options: RequestOptions,
        client: ClientProfile,
        progress: RequestProgress,
    ) -> Segmented:
        """Segments a request's images; cancelling it stops the work within one canvas."""
        config = options.adapt(model.config)
        works = await self._prepare(config, images, options)
        admitted = [work for work in works if isinstance(work, ImageWork)]
        costs = [work.canvases for work in admitted]
        with self.admission.admit(client, costs):
            if admitted:
                progress.admit(sum(costs))
                job = Job(
                    client=client,
                    images=admitted,
                    priority=options.priority,
                    progress=progress,
                    done=asyncio.get_running_loop().create_future(),
                )
                await model.scheduler.run(job)
        return Segmented(model.state, [self._count(model, work) for work in works])

    async def _prepare(
        self, config: ModelConfig, images: Sequence[ImageFile], options: RequestOptions
    ) -> list[ImageWork | Outcome]:
        """Reads the headers: the work of each image, or why it is refused."""
        settings = self._settings
        sizes = [peek_size(image.data) for image in images]
        build = partial(_build_work, config, options=options, settings=settings)
        if None in sizes:  # an unusual header takes milliseconds
            return await asyncio.to_thread(lambda: [*map(build, images, sizes)])
        return [*map(build, images, sizes)]

    def _count(self, model: ServedModel, work: ImageWork | Outcome) -> Outcome:
        """Counts a finished image."""
        outcome = work.outcome if isinstance(work, ImageWork) else work
        assert outcome is not None
        name, metrics = model.name, self.metrics
        if outcome.timing is None:
            assert outcome.error is not None
            code = describe_error(outcome.error)[1]["code"]
            if code == "internal_error":
                logger.error("an image failed", exc_info=outcome.error)
                drop_frames(outcome.error)
            metrics.image_errors.labels(name, code).inc()
        else:
            metrics.count_image(name, outcome)
            note_image(name, outcome.whole, outcome.stages)
        return outcome

    async def rescan(self) -> None:
        """Follows the changes of the model repository, as polling does; never raises."""
        await self._watcher.check()

    async def load(self, name: str) -> None:
        """Serves what the model's config.json says now."""
        await self.store.load(name)

    async def unload(self, name: str) -> None:
        """Stops serving a model."""
        await self.store.unload(name)

    async def finish_accepted(self) -> bool:
        """Refuses new work and waits, within the drain timeout, for what was accepted."""
        return await self.admission.finish(self._settings.drain_timeout_s)

    async def give_up(self) -> None:
        """Answers what was accepted and is not finished with 503."""
        await self.store.close(finished=False)

    async def drain(self) -> None:
        """Finishes accepted work, then frees the engines."""
        finished = await self.finish_accepted()
        if self._polling is not None:
            self._polling.cancel()
        await self.store.close(finished=finished)


def _build_work(
    config: ModelConfig,
    file: ImageFile,
    size: HW | None,
    *,
    options: RequestOptions,
    settings: Settings,
) -> ImageWork | Outcome:
    try:
        size, canvases, config = measure(file, size, config, options, settings)
    except (DecodeError, ServiceError) as error:
        return fail(file.file_name, error)
    scaled = settings.scaled_decode
    return ImageWork(file, size, canvases, config, options, scaled=scaled)


def measure(
    file: ImageFile,
    size: HW | None,
    config: ModelConfig,
    options: RequestOptions,
    settings: Settings,
) -> tuple[HW, int, ModelConfig]:
    """Height and width of an image, the canvases that it needs, and the configuration for it.

    Args:
        file: The image.
        size: As `peek_size` found it; None if the header has to be parsed.
        config: The model's, as the request's options adapt it.
        options: The request's.
        settings: Bounds of size and canvases.

    Raises:
        DecodeError, TooManyCanvases: The image is refused.
    """
    if size is None:
        header = read_image_header(file.data, settings.max_image_pixels)
        size, config = header.hw, options.adapt_to(config, header.um_per_px)
    check_size(*size, settings.max_image_pixels)
    return size, count_cost(size, config.input, settings.max_image_canvases), config
