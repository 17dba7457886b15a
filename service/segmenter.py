"""The models that are served, and which requests are let in to them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from service.admission import Admission
from service.backends.restarting import RestartingBackend
from service.batcher import BatchStats, DynamicBatcher
from service.engines import describe_engine
from service.errors import (
    EngineRestarting,
    ModelUnavailable,
    StartupError,
    UnknownModel,
    UnknownVersion,
)
from service.metrics import Metrics
from service.registry import LoadedModel, Repository
from service.settings import Settings
from service.stages import ImageFile, Job, Outcome, ServedModel, Stages
from service.steps import Options

logger = logging.getLogger(__name__)

BATCH_PATIENCE_S = 10.0
"""Batch work stands back for interactive work that comes up to this much later, no further: under
steady interactive load it is slow, but it is done."""


class Segmenter:
    """Serves the models of a repository; `start` it in the event loop, `drain` it at last.

    Args:
        settings: Bounds, threads and delays.
        repository: Loaded models; the segmenter closes them at the end.
        metrics: Where everything is counted.

    Attributes:
        models: What is served, by name.
    """

    def __init__(self, settings: Settings, repository: Repository, metrics: Metrics) -> None:
        self.repository = repository
        self.metrics = metrics
        self.admission = Admission(settings.max_queue_images, settings.max_queue_pixels)
        self._settings = settings
        self.models: Mapping[str, ServedModel] = {
            name: self._serve(model) for name, model in repository.models.items()
        }
        self._stages = Stages(settings, metrics)
        self._requests = 0
        self.default_model = self._choose_default()
        self._announce()

    def _choose_default(self) -> str:
        name = self._settings.default_model
        if name is None:
            return min(self.models)
        if name not in self.models and name not in self.repository.refused:
            raise StartupError(f"there is no default model {name!r}, only {sorted(self.models)}")
        return name

    def _serve(self, model: LoadedModel) -> ServedModel:
        engine = self._watch(model)
        return ServedModel(model, engine, self._build_batcher(model, engine))

    def _watch(self, model: LoadedModel) -> RestartingBackend:
        name = model.config.name

        def count(alive: bool) -> None:
            self.metrics.engine_up.labels(name).set(alive)
            if alive:
                self.metrics.engine_restarts.labels(name).inc()

        return RestartingBackend(
            model.backend,
            lambda: self.repository.rebuild(model),
            model.probe,
            timeout_s=self._settings.engine_timeout_s,
            on_restart=count,
        )

    def _build_batcher(self, model: LoadedModel, engine: RestartingBackend) -> DynamicBatcher:
        name = model.config.name

        def count(stats: BatchStats) -> None:
            self.metrics.batch_size.labels(name).observe(stats.size)
            if stats.failed:
                self.metrics.engine_failures.labels(name).inc()

        return DynamicBatcher(
            engine,
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
        for name, model in self.models.items():
            metrics.add_model(name, model.loaded.version, partial(describe_engine, model.engine))
        for name in self.repository.refused:
            metrics.model_refused.labels(name).set(1)

    @property
    def default_timeout_ms(self) -> int | None:
        """Time of a request that gives none; None: as long as it takes."""
        return self._settings.request_timeout_ms

    @property
    def is_ready(self) -> bool:
        """Whether new work is taken."""
        return self.admission.is_open and all(m.engine.is_alive for m in self.models.values())

    def start(self) -> None:
        """Starts the batchers; needs a running event loop."""
        for model in self.models.values():
            model.batcher.start()
        self.metrics.ready.set_function(lambda: self.is_ready)

    def close_admission(self) -> None:
        """Refuses new work from now on; what was accepted goes on."""
        self.admission.close()

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
        for model in self.models.values():
            if not finished or not model.engine.is_alive:
                model.engine.close()  # nobody waits for it, or for another, any more
            await (model.batcher.drain() if finished else model.batcher.abort())
            model.engine.close()
        self._stages.shutdown()
        self.repository.close()

    def find_model(self, name: str | None, version: int | None) -> ServedModel:
        """The model that a request means, if its engine can take work.

        Args:
            name: None takes the default model.
            version: None takes the version that is served.

        Raises:
            UnknownModel: There is none of that name.
            ModelUnavailable: It was refused.
            UnknownVersion: It is not the version that is served.
            EngineRestarting: Its engine has died and another is being built.
        """
        if name is None:
            name = self.default_model
        if name in self.repository.refused:
            raise ModelUnavailable(f"model {name!r} was refused; see GET /v2/models")
        if name not in self.models:
            raise UnknownModel(f"there is no model {name!r}, only {sorted(self.models)}")
        model = self.models[name]
        if version not in (None, model.loaded.version):
            raise UnknownVersion(
                f"model {name!r} is served in version {model.loaded.version}, not {version}"
            )
        if not model.engine.is_alive:
            raise EngineRestarting(f"the engine of model {name!r} has died; another is being built")
        return model

    async def segment(
        self, model: ServedModel, images: Sequence[ImageFile], options: Options
    ) -> list[Outcome]:
        """Segments a request's images; cancelling it removes what still waits.

        Raises:
            Overloaded, TooManyImages, Draining: None of them was admitted.
        """
        began_s = asyncio.get_running_loop().time()
        rank = began_s + (BATCH_PATIENCE_S if options.priority == "batch" else 0.0)
        job = Job(model, options, began_s, rank)
        headers = await self._stages.read_headers(images, job)
        pixels = [header for header in headers if isinstance(header, int)]
        with self.admission.admit(len(pixels), sum(pixels)):
            return await asyncio.gather(
                *(
                    self._stages.run(image, header, job)
                    for image, header in zip(images, headers, strict=True)
                )
            )
