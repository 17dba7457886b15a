"""The models that are served, and which requests are let in to them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from service.models.repository import Repository
from service.models.store import ModelStore
from service.observe.metrics import Metrics
from service.settings import Settings
from service.work.admission import Admission
from service.work.stages import ImageFile, Job, Outcome, ServedModel, Stages, gather_or_cancel
from service.work.steps import Options

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
        store: What is served.
    """

    def __init__(self, settings: Settings, repository: Repository, metrics: Metrics) -> None:
        self._repository = repository
        self.metrics = metrics
        self.admission = Admission(settings.max_queue_images, settings.max_queue_pixels)
        self.store = ModelStore(settings, repository, metrics)
        self._settings = settings
        self._stages = Stages(settings, metrics)
        self._requests = 0
        self._polling: asyncio.Task[None] | None = None
        self._announce()

    def _announce(self) -> None:
        metrics, admission = self.metrics, self.admission
        metrics.watch_queue(lambda: admission.images, lambda: admission.pixels)
        metrics.in_flight_requests.set_function(lambda: self._requests)
        metrics.queue_limit_images.set(admission.max_images)
        metrics.queue_limit_pixels.set(admission.max_pixels)

    @property
    def default_timeout_ms(self) -> int | None:
        """Time of a request that gives none; None: as long as it takes."""
        return self._settings.request_timeout_ms

    @property
    def is_ready(self) -> bool:
        """Whether new work is taken."""
        return self.admission.is_open and all(
            model.engine.is_alive for model in self.store.all_models
        )

    def start(self) -> None:
        """Starts the batchers and, if asked for, watching the repository."""
        self.store.start()
        if self._settings.model_poll_s:
            poll = self.store.poll(self._settings.model_poll_s)
            self._polling = asyncio.get_running_loop().create_task(poll, name="poll")
        self.metrics.ready.set_function(lambda: self.is_ready)

    def close_admission(self) -> None:
        """Refuses new work from now on; what was accepted goes on."""
        self.admission.close()

    @contextmanager
    def use_model(self, name: str | None, version: int | None) -> Iterator[ServedModel]:
        """The model that a request means, as `ModelStore.use`; the request counts meanwhile.

        Raises:
            Draining, Overloaded: Nothing can be let in; nothing need be read.
        """
        self._requests += 1
        try:
            with self.store.use(name, version) as model:
                self.admission.check_open()
                yield model
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

    async def give_up(self) -> None:
        """Answers what was accepted and is not finished: 503."""
        await self.store.close(finished=False)

    async def drain(self) -> None:
        """Finishes accepted work, then frees the engines."""
        finished = await self.finish_accepted()
        if self._polling is not None:
            self._polling.cancel()
        await self.store.close(finished=finished)
        self._stages.shutdown()
        self._repository.close()

    async def segment(
        self, model: ServedModel, images: Sequence[ImageFile], options: Options
    ) -> list[Outcome]:
        """Segments a request's images; cancelling it removes what still waits.

        Raises:
            Overloaded, TooManyImages, Draining: None of them was admitted.
        """
        began_s = time.monotonic()
        rank = began_s + (BATCH_PATIENCE_S if options.priority == "batch" else 0.0)
        job = Job(model, options, began_s, rank)
        headers = await self._stages.read_headers(images, job)
        pixels = [header for header in headers if isinstance(header, int)]
        with self.admission.admit(len(pixels), sum(pixels)):
            return await gather_or_cancel(
                self._stages.run(image, header, job)
                for image, header in zip(images, headers, strict=True)
            )
