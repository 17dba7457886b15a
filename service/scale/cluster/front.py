"""A front's segmenter: the HTTP application asks it, and it asks the workers.

Segmenting twice does no harm, so a call whose worker is lost goes to another one, a bounded number
of times and within the request's deadline: an image that kills its worker must not kill them all.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

from pipeline.postprocess import TileCandidates
from pipeline.types import Tile
from service.engines.base import BackendError, Precision
from service.errors import (
    Draining,
    EngineRestarting,
    ModelRefused,
    ModelUnavailable,
    Overloaded,
    ServiceError,
    UnknownModel,
    UnknownVersion,
)
from service.models.engine_state import EngineState
from service.models.repository import LoadedModel, Repository
from service.models.store import ModelStore
from service.scale.cluster.messages import Answer, Call, Description, WorkerLost, Workers
from service.scale.cluster.metrics import FrontMetrics
from service.settings import Settings
from service.work.segmenter import Segmenter
from service.work.stages import ImageFile, Job, Outcome, ServedModel
from service.work.steps import Options

logger = logging.getLogger(__name__)

TRIES = 5
BACKOFF_S = 0.1
"""Before the second try; each later one waits twice as long."""
REFRESH_S = 2.0
"""How often a front asks what is served."""
SILENCE_S = 15.0
"""A front that no worker has answered for so long is not ready."""
ELSEWHERE = (
    *(Draining, EngineRestarting, ModelUnavailable, Overloaded, UnknownModel, UnknownVersion),
)
"""A worker that refuses a call with one of these need not be like the others: during an upgrade
the old and the new ones serve side by side."""


class RemoteEngine:
    """Stands for an engine of the workers where one is described.

    Args:
        state: What a worker says of it.
    """

    concurrency = 1

    def __init__(self, state: EngineState) -> None:
        self.name = state.name
        self.device = state.device
        self.precision: Precision = state.precision
        self.reason = state.reason
        if state.build is not None:
            self.status, self.progress = state.build.status, state.build.progress

    def infer(self, tiles: Sequence[Tile]) -> Sequence[TileCandidates]:
        """Never called: a front sends images, not canvases."""
        raise BackendError("the engine is in another process")

    def close(self) -> None:
        """Does nothing: it is not this process's."""


@dataclass(eq=False)
class AskedModel(ServedModel):
    """A model as one request sees it.

    Attributes:
        version: The version that the client named.
    """

    version: int | None = None


class FrontSegmenter(Segmenter):
    """Admission, bounds and description of models are here, all other work at the workers.

    Args:
        settings: Bounds; those of the engines are not used.
        workers: Who does the work.
        description: What they serve now; it is asked for again and again.
        metrics: Where requests are counted.
    """

    metrics: FrontMetrics

    def __init__(
        self,
        settings: Settings,
        workers: Workers,
        description: Description,
        metrics: FrontMetrics,
    ) -> None:
        # The workers watch the repository.
        settings = settings.model_copy(update={"model_poll_s": 0.0})
        super().__init__(settings, _as_repository(settings, description), metrics)
        self.store.unavailable.update(description.unavailable)
        self._workers = workers
        self._description = description
        self._heard_s = time.monotonic()
        self._refreshing: asyncio.Task[None] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether new work is taken and workers answer."""
        return super().is_ready and time.monotonic() - self._heard_s < SILENCE_S

    def start(self) -> None:
        """Starts asking what is served."""
        super().start()
        self._refreshing = asyncio.get_running_loop().create_task(self._refresh(), name="refresh")

    async def drain(self) -> None:
        """Finishes accepted work."""
        if self._refreshing is not None:
            self._refreshing.cancel()
        await super().drain()

    @contextmanager
    def use_model(self, name: str | None, version: int | None) -> Iterator[ServedModel]:
        """See `Segmenter.use_model`; the model's version may become another while it is used."""
        with super().use_model(name, version) as model:
            known = {field.name: getattr(model, field.name) for field in fields(ServedModel)}
            yield AskedModel(**known, version=version)

    async def segment(
        self, model: ServedModel, images: Sequence[ImageFile], options: Options
    ) -> list[Outcome]:
        """See `Segmenter.segment`."""
        assert isinstance(model, AskedModel)
        began_s = time.monotonic()
        job = Job(model, options, began_s, began_s)
        headers = await self._stages.read_headers(images, job)
        pixels = [header for header in headers if isinstance(header, int)]
        call = Call(
            model=model.name,
            version=model.version,
            expected=model.loaded.version,
            images=images,
            options=options,
        )
        with self.admission.admit(len(pixels), sum(pixels)):
            answer = await self._ask(call)
        if answer.config is not None:
            model.loaded = replace(model.loaded, config=answer.config, version=answer.version)
        whole_s = time.monotonic() - began_s
        return [_add_the_way(outcome, whole_s) for outcome in answer.outcomes]

    async def _ask(self, call: Call) -> Answer:
        """A worker's answer, after as many lost or unable ones as there may be."""
        error: Exception
        for attempt in range(TRIES):
            if attempt:
                self.metrics.retries.inc()
                await asyncio.sleep(BACKOFF_S * 2 ** (attempt - 1))
            try:
                answer = await self._workers.segment(call)
            except WorkerLost as lost:
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
                await self._change(description)

    async def _change(self, description: Description) -> None:
        """Describes what is served from now on; requests in work keep the model they have."""
        old = self.store
        store = ModelStore(
            self._settings, _as_repository(self._settings, description), self.metrics
        )
        store.unavailable.update(description.unavailable)
        store.start()
        self.store, self._description = store, description
        await old.close(finished=True)


def _as_repository(settings: Settings, description: Description) -> Repository:
    """What workers serve as if it had been loaded here."""
    models: dict[str, dict[int, LoadedModel]] = {}
    for model in description.models:
        engine = RemoteEngine(model.engine)
        loaded = LoadedModel(model.config, model.version, engine)
        models.setdefault(model.config.name, {})[model.version] = loaded
    root = settings.model_repo
    refused = {
        name: ModelRefused(root / name, reason)
        for name, reason in description.unavailable.items()
        if name not in models
    }
    return Repository(root, models, refused, settings.backend_options())


def _add_the_way(outcome: Outcome, whole_s: float) -> Outcome:
    """Counts what an image did not spend at its worker as waiting."""
    timing = outcome.timing
    if timing is None:
        return outcome
    way_s = max(0.0, whole_s - timing.total)
    return replace(
        outcome,
        timing=replace(timing, queue=timing.queue + way_s, total=timing.total + way_s),
    )
