"""The segmenter of one process: admission, and the schedulers of the served models."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import cv2

from pipeline.auto_scale import count_probes
from pipeline.decode import check_size
from pipeline.errors import DecodeError
from pipeline.model_config import ModelConfig
from service.cores import count_cores
from service.errors import ServiceError, describe_error, drop_frames
from service.models.repository import Repository
from service.models.served import ServedModel
from service.models.shadows import Shadows
from service.models.store import ModelStore
from service.models.watcher import RepositoryWatcher
from service.observe.metrics import Metrics
from service.observe.tracing import note_image
from service.protocol import ModelState, Segmented
from service.settings import Settings
from service.work.admission import Admission
from service.work.image import HW, ImageWork, count_cost, fail, peek_size, read_image_header
from service.work.pixels import PixelBudget
from service.work.probe import ProbeWork
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
        self._shadows = Shadows(
            settings,
            repository.root,
            repository.options,
            metrics.shadow,
            is_served=lambda name: name in self.store.served,
            is_idle=lambda: not self.admission.requests,
            reload=self.store.load,
        )
        self.store.on_change = self._shadows.follow
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
        return [self._state_of(model) for model in self.store.all_models]

    def _state_of(self, model: ServedModel) -> ModelState:
        return replace(model.state, shadow=self._shadows.state_of(model.name))

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
        for name in self.store.served:
            self._shadows.follow(name)
        if self._settings.model_poll_s:
            poll = self._watcher.poll(self._settings.model_poll_s)
            self._polling = asyncio.get_running_loop().create_task(poll, name="poll")
        self.metrics.follow(self.metrics.ready, lambda: self.is_ready)

    def find(self, name: str | None, version: int | None) -> ModelState:
        """The model that a request means."""
        return self._state_of(self.store.find(name, version))

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
        probes: list[ImageWork | Outcome | None] = [None] * len(images)
        if options.scale == "auto":
            build_probe = partial(_build_probe, config, options=options, settings=self._settings)
            probes = [*await self._prepare(images, build_probe)]
            await self._process(model, probes, options, client, progress)
        build = partial(_build_work, config, options=options, settings=self._settings)
        works = await self._prepare(images, build, probes)
        await self._process(model, works, options, client, progress)
        outcomes = [self._count(model, work, options) for work in works]
        self._shadows.offer(model.name, model.config.version, images, options, outcomes)
        return Segmented(model.state, outcomes)

    async def _process(
        self,
        model: ServedModel,
        works: Sequence[ImageWork | Outcome | None],
        options: RequestOptions,
        client: ClientProfile,
        progress: RequestProgress,
    ) -> None:
        """Has those images that are not refused admitted and processed."""
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

    async def _prepare(
        self,
        images: Sequence[ImageFile],
        build: Callable[..., ImageWork | Outcome],
        *more: Sequence[object],
    ) -> list[ImageWork | Outcome]:
        """Reads the headers: the work of each image, or why it is refused.

        Args:
            images: The request's.
            build: Called with an image, its size if that is known, and its entries of `more`.
            more: Each has an entry for each image.
        """
        sizes = [peek_size(image.data) for image in images]
        if None in sizes:  # an unusual header takes milliseconds
            return await asyncio.to_thread(lambda: [*map(build, images, sizes, *more)])
        return [*map(build, images, sizes, *more)]

    def _count(
        self, model: ServedModel, work: ImageWork | Outcome, options: RequestOptions
    ) -> Outcome:
        """Counts a finished image."""
        outcome = work.outcome if isinstance(work, ImageWork) else work
        assert outcome is not None
        name, version, metrics = model.name, model.loaded.version, self.metrics
        if outcome.timing is None:
            assert outcome.error is not None
            code = describe_error(outcome.error)[1]["code"]
            if code == "internal_error":
                logger.error("an image failed", exc_info=outcome.error)
                drop_frames(outcome.error)
            metrics.count_error(name, version, code)
        else:
            is_timed = options.priority != "background"
            metrics.count_image(name, version, outcome, timed=is_timed)
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
        await self._shadows.close()
        await self.store.close(finished=finished)


def _build_work(
    config: ModelConfig,
    file: ImageFile,
    size: HW | None,
    probe: ImageWork | Outcome | None,
    *,
    options: RequestOptions,
    settings: Settings,
) -> ImageWork | Outcome:
    if isinstance(probe, Outcome):  # its header was refused
        return probe
    if isinstance(probe, ProbeWork):
        config = probe.scaled
        if probe.outcome is not None and probe.outcome.error is not None:
            return probe.outcome
    try:
        size, canvases, config = measure(file, size, config, options, settings)
    except (DecodeError, ServiceError) as error:
        return fail(file.file_name, error)
    scaled = settings.scaled_decode
    return ImageWork(file, size, canvases, config, options, scaled=scaled, probe=probe)


def _build_probe(
    config: ModelConfig,
    file: ImageFile,
    size: HW | None,
    *,
    options: RequestOptions,
    settings: Settings,
) -> ImageWork | Outcome:
    try:
        size, canvases, config = measure(file, size, config, options, settings, probing=True)
    except (DecodeError, ServiceError) as error:
        return fail(file.file_name, error)
    return ProbeWork(file, size, canvases, config, options)


def measure(
    file: ImageFile,
    size: HW | None,
    config: ModelConfig,
    options: RequestOptions,
    settings: Settings,
    *,
    probing: bool = False,
) -> tuple[HW, int, ModelConfig]:
    """Height and width of an image, the canvases that it needs, and the configuration for it.

    Args:
        file: The image.
        size: As `peek_size` found it; None if the header has to be parsed.
        config: The model's, as the request's options adapt it.
        options: The request's.
        settings: Bounds of size and canvases.
        probing: Counts the canvases by which the scale is chosen.

    Raises:
        DecodeError, TooManyCanvases: The image is refused.
    """
    if size is None:
        header = read_image_header(file.data, settings.max_image_pixels)
        size, config = header.hw, options.adapt_to(config, header.um_per_px)
    check_size(*size, settings.max_image_pixels)
    if probing:  # the orientation is not known yet
        return size, max(count_probes(hw, config.input) for hw in (size, size[::-1])), config
    return size, count_cost(size, config.input, settings.max_image_canvases), config
