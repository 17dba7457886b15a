"""A front's segmenter: admission and the description of models are here, the work at the workers.

A request can be repeated without harm, so a call whose worker is lost goes to another one, a
bounded number of times and within the request's deadline: an image that kills its worker must not
kill them all. A job has other files to go on with, so its file is not repeated here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from pipeline.errors import DecodeError
from pipeline.model_config import ModelConfig
from service.errors import (
    Draining,
    EngineRestarting,
    Forbidden,
    ModelUnavailable,
    Overloaded,
    ProcessLost,
    ServiceError,
    UnknownModel,
    UnknownVersion,
)
from service.protocol import ModelState, Segmented, choose_default, find_model
from service.scale.cluster.messages import (
    Answer,
    Call,
    Description,
    WorkerDied,
    WorkerLost,
    Workers,
)
from service.scale.cluster.metrics import FrontMetrics
from service.segmenter import measure
from service.settings import Settings
from service.work.admission import Admission
from service.work.image import fail, peek_size
from service.work.request import ClientProfile, ImageFile, Outcome, RequestOptions, RequestProgress

logger = logging.getLogger(__name__)

TRIES = 5
BACKOFF_S = 0.1
"""Before the second try; doubles before each later one."""
REFRESH_S = 2.0
"""How often a front asks what is served."""
SILENCE_S = 15.0
"""A front that no worker has answered for so long is not ready."""
ELSEWHERE = (
    *(Draining, EngineRestarting, ModelUnavailable, Overloaded, UnknownModel, UnknownVersion),
)
"""Errors that another worker may not have: during an upgrade old and new ones serve together."""


@dataclass(frozen=True)
class RequestedModel:
    """A model as a request names it.

    Attributes:
        state: The version that the front would use.
        version: The version that the client named.
    """

    state: ModelState
    version: int | None

    @property
    def name(self) -> str:
        """The model's name."""
        return self.state.name


class ClusterSegmenter:
    """Sends the images of requests to workers; implements `service.protocol.Segmenter`.

    Args:
        settings: Bounds; those of the engines are not used.
        workers: Process the requests.
        description: The models that they serve now; refreshed regularly.
        metrics: Where requests are counted.
    """

    def __init__(
        self,
        settings: Settings,
        workers: Workers,
        description: Description,
        metrics: FrontMetrics,
    ) -> None:
        self.metrics = metrics
        self.admission = Admission(settings.max_queue_canvases)
        self._settings = settings
        self._workers = workers
        self._heard_s = time.monotonic()
        self._refreshing: asyncio.Task[None] | None = None
        self._describe(description)
        metrics.watch(self.admission)

    @property
    def is_ready(self) -> bool:
        """Whether new work is admitted, and workers answer and serve models."""
        is_heard = time.monotonic() - self._heard_s < SILENCE_S
        engines = [model.engine.is_alive for model in self.models]
        return self.admission.is_open and is_heard and bool(engines) and all(engines)

    @property
    def failure(self) -> None:
        """None: Serve replaces the workers."""

    @property
    def models(self) -> Sequence[ModelState]:
        """What the workers serve, by name and version."""
        return self._description.models

    @property
    def unavailable(self) -> Mapping[str, str]:
        """Why they do not serve other models; by name."""
        return self._description.unavailable

    @property
    def default_model(self) -> str | None:
        """Name of the model of requests that name none; None if such requests are refused."""
        named = self._settings.default_model or self._description.default_model
        return choose_default(self._served, named)

    def start(self) -> None:
        """Starts asking what is served."""
        self._refreshing = asyncio.get_running_loop().create_task(self._refresh(), name="refresh")
        self.metrics.follow(self.metrics.ready, lambda: self.is_ready)

    def find(self, name: str | None, version: int | None) -> ModelState:
        """The model that a request means, as a worker described it last."""
        model = find_model(self._served, self.unavailable, self.default_model, name, version)
        if not model.engine.is_alive:
            raise EngineRestarting(f"the engine of model {model.name!r} is being rebuilt")
        return model

    @contextmanager
    def use(
        self, name: str | None, version: int | None, client: ClientProfile
    ) -> Iterator[RequestedModel]:
        """As `find`; the worker that gets the request may use another version."""
        model = self.find(name, version)
        with self.admission.request(client):
            yield RequestedModel(model, version)

    async def segment(
        self,
        model: RequestedModel,
        images: Sequence[ImageFile],
        options: RequestOptions,
        client: ClientProfile,
        progress: RequestProgress,
    ) -> Segmented:
        """Has a worker segment a request's images; cancelling it cancels the worker's work."""
        config = options.adapt(model.state.config)
        costs = await asyncio.to_thread(self._measure, config, options, images)
        admitted = [image for image, cost in zip(images, costs, strict=True) if type(cost) is int]
        call = Call(
            model=model.name,
            version=model.version,
            expected=model.state.version,
            images=admitted,
            options=options,
            client=client,
        )
        counts = [cost for cost in costs if isinstance(cost, int)]
        began_s = time.monotonic()
        with self.admission.admit(client, counts):
            answer = Answer()
            if admitted:
                progress.admit(sum(counts))
                answer = await self._ask(call)
        whole_s = time.monotonic() - began_s
        answered = iter([_add_transfer(outcome, whole_s) for outcome in answer.outcomes])
        outcomes = [cost if isinstance(cost, Outcome) else next(answered) for cost in costs]
        return Segmented(answer.model or model.state, outcomes)

    def _measure(
        self, config: ModelConfig, options: RequestOptions, images: Sequence[ImageFile]
    ) -> list[int | Outcome]:
        """Canvases of each image, or the outcome of one that is refused."""
        probing = options.scale == "auto"
        costs: list[int | Outcome] = []
        for image in images:
            try:
                size = peek_size(image.data)
                costs.append(
                    measure(image, size, config, options, self._settings, probing=probing)[1]
                )
            except (DecodeError, ServiceError) as error:
                costs.append(fail(image.file_name, error))
        return costs

    async def _ask(self, call: Call) -> Answer:
        """A worker's answer; a lost or unable worker is followed by another."""
        error: Exception
        for attempt in range(TRIES):
            if attempt:
                self.metrics.retries.inc()
                await asyncio.sleep(BACKOFF_S * 2 ** (attempt - 1))
            try:
                answer = await self._workers.segment(call)
            except WorkerLost as lost:
                if isinstance(lost, WorkerDied) and call.options.priority == "background":
                    raise ProcessLost(f"the worker ended: {lost}") from lost
                error = lost
            else:
                self._heard_s = time.monotonic()
                if answer.error is None:
                    return answer
                if not isinstance(answer.error, ELSEWHERE):
                    raise answer.error
                error = answer.error
            logger.warning("try %d of %d: %s", attempt + 1, TRIES, error)
        if isinstance(error, ServiceError):
            raise error
        raise EngineRestarting(f"{TRIES} workers were lost with this request; the last: {error}")

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                async with asyncio.timeout(SILENCE_S):
                    description = await self._workers.describe()
            except (WorkerLost, TimeoutError) as error:
                logger.warning("no worker says what is served: %r", error)
                continue
            self._heard_s = time.monotonic()
            if description != self._description:
                self._describe(description)

    def _describe(self, description: Description) -> None:
        """Takes over what is served; requests in flight keep the model they have."""
        self._description = description
        self._served: dict[str, dict[int, ModelState]] = {}
        for model in description.models:
            self._served.setdefault(model.name, {})[model.version] = model
        self.metrics.describe_models(description.models)

    async def load(self, name: str) -> None:
        """Always refused: it would change one worker."""
        raise Forbidden(f"{name!r} cannot be loaded here; workers watch the model repository")

    async def unload(self, name: str) -> None:
        """Always refused: it would change one worker."""
        raise Forbidden(f"{name!r} cannot be unloaded here; workers watch the model repository")

    async def rescan(self) -> None:
        """Does nothing: the workers watch the model repository."""

    async def finish_accepted(self) -> bool:
        """Refuses new work and waits, within the drain timeout, for what was accepted."""
        return await self.admission.finish(self._settings.drain_timeout_s)

    async def give_up(self) -> None:
        """Does nothing: the workers answer or fail what is in flight."""

    async def drain(self) -> None:
        """Finishes accepted work."""
        if self._refreshing is not None:
            self._refreshing.cancel()
        await self.finish_accepted()


def _add_transfer(outcome: Outcome, whole_s: float) -> Outcome:
    """Counts the time that an image was not at its worker as waiting."""
    timing = outcome.timing
    if timing is None:
        return outcome
    transfer_s = max(0.0, whole_s - timing.total)
    return replace(
        outcome,
        timing=replace(timing, queue=timing.queue + transfer_s, total=timing.total + transfer_s),
    )
