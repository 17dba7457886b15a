"""A model store whose engines tests can hold, kill and replace by faster ones."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from pipeline.postprocess import TileCandidates
from pipeline.preprocess import prepare
from pipeline.types import Tile
from service.engines.base import Backend, BackendOptions, Precision
from service.models.repository import load_repository
from service.models.served import ServedModel
from service.models.store import ModelStore
from service.observe.metrics import Metrics
from service.settings import Settings
from tests.support.blob_model import draw_picture

OPTIONS = BackendOptions(device="cpu", threads=1)


class Controlled:
    """An engine around another one that tests can hold, kill and watch.

    Attributes:
        inside: Set by every call; calls wait for `go`.
    """

    device = "cpu"
    precision: Precision = "fp32"
    concurrency = 1

    def __init__(self, engine: Backend | None, name: str = "first") -> None:
        self.name = self.reason = name
        self.engine = engine
        self.dead = self.closed = False
        self.upgrade: FakeUpgrade | None = None
        self.inside, self.go = threading.Event(), threading.Event()
        self.go.set()

    def infer(self, tiles: Sequence[Tile]) -> Sequence[TileCandidates]:
        self.inside.set()
        assert self.go.wait(20)
        if self.dead:
            raise MemoryError("bad allocation")
        assert self.engine is not None
        return self.engine.infer(tiles)

    def close(self) -> None:
        self.closed = True


class FakeUpgrade:
    """Builds `engine` when it is told to.

    Attributes:
        failure: Raised instead, if there is one.
    """

    def __init__(self, failure: Exception | None = None) -> None:
        self.engine = Controlled(None, "faster")
        self.failure = failure
        self.may_build, self.cancelled = threading.Event(), threading.Event()
        self.loads = 0

    def build(self, report: Callable[[str, float], None]) -> None:
        report("compiling", 0.25)
        while not self.may_build.wait(0.01):
            if self.cancelled.is_set():
                raise OSError("cancelled")
        if self.failure is not None:
            raise self.failure

    def load(self) -> Backend:
        self.loads += 1
        return self.engine

    def cancel(self) -> None:
        self.cancelled.set()


@asynccontextmanager
async def open_store(
    settings: Settings, upgrade: FakeUpgrade | None = None
) -> AsyncIterator[ModelStore]:
    """A started store whose model `blobs` has controlled engines."""
    repository = load_repository(settings.model_repo, OPTIONS)
    versions = {}
    for version, model in repository.models["blobs"].items():
        engine = Controlled(model.backend)
        if upgrade is not None:
            engine.upgrade, upgrade.engine.engine = upgrade, model.backend
        versions[version] = replace(model, backend=engine)
    repository = replace(repository, models={**repository.models, "blobs": versions})
    store = ModelStore(settings, repository, Metrics())
    store.start()
    try:
        yield store
    finally:
        await store.close(finished=True)


async def infer(model: ServedModel) -> Sequence[TileCandidates]:
    """One call of a model's engine in a thread, as the scheduler makes it."""
    tiles = list(prepare(draw_picture(), model.config.input).tiles)
    return await asyncio.to_thread(model.engine.infer, tiles, lambda: None)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def engine_of(model: ServedModel) -> Controlled:
    engine = model.engine.current
    assert isinstance(engine, Controlled)
    return engine
