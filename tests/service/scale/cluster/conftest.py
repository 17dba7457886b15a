"""Fronts and workers in one process, without Ray."""

from __future__ import annotations

import pickle
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from service.http.app import create_app
from service.scale.cluster.front import ClusterSegmenter
from service.scale.cluster.messages import Answer, Call, Description, WorkerLost
from service.scale.cluster.metrics import FrontMetrics
from service.scale.cluster.settings import ClusterSettings
from service.scale.cluster.worker import Worker, start_segmenter
from service.scale.merged_metrics import Report
from service.settings import Settings
from tests.service.conftest import OpenClient


@dataclass
class LocalWorkers:
    """Workers that are asked in turn; what travels is pickled, as it is between machines.

    Attributes:
        workers: The workers, or what they answer whatever they are asked; None is one that dies.
        calls: All calls.
        faults: What the calls with an image of that name raise, one after the other.
    """

    workers: Sequence[Worker | Answer | None]
    calls: list[Call] = field(default_factory=list)
    faults: dict[str, list[WorkerLost]] = field(default_factory=dict)

    async def segment(self, call: Call) -> Answer:
        worker = self.workers[len(self.calls) % len(self.workers)]
        self.calls.append(pickle.loads(pickle.dumps(call)))
        if faults := self.faults.get(call.images[0].file_name or ""):
            raise faults.pop()
        if worker is None:
            raise WorkerLost("ActorDiedError")
        answer = worker if isinstance(worker, Answer) else await worker.segment(self.calls[-1])
        travelled: Answer = pickle.loads(pickle.dumps(answer))
        return travelled

    async def describe(self) -> Description:
        for worker in self.workers:
            if isinstance(worker, Worker):
                description: Description = pickle.loads(pickle.dumps(await worker.describe()))
                return description
        raise WorkerLost("ActorDiedError")

    async def collect(self) -> list[Report]:
        return []


@pytest.fixture
def cluster_settings(model_repo: Path) -> ClusterSettings:
    return ClusterSettings(model_repo=model_repo, default_model="blobs")


@asynccontextmanager
async def run_worker(settings: ClusterSettings) -> AsyncIterator[Worker]:
    segmenter = await start_segmenter(settings.server_settings())
    yield Worker(segmenter)
    await segmenter.drain()


@pytest.fixture
async def worker(cluster_settings: ClusterSettings) -> AsyncIterator[Worker]:
    async with run_worker(cluster_settings) as running:
        yield running


async def build_front(
    settings: ClusterSettings, workers: LocalWorkers, describing: Worker, **changes: Any
) -> FastAPI:
    given = Settings(**{**settings.server_settings(), **changes})
    description = await describing.describe()
    metrics = FrontMetrics(workers.collect)
    return create_app(given, segmenter=ClusterSegmenter(given, workers, description, metrics))


@pytest.fixture
def open_front(cluster_settings: ClusterSettings, worker: Worker, open_client: OpenClient) -> Any:
    """Opens a client of a front with certain workers."""

    @asynccontextmanager
    async def open_it(*workers: Worker | Answer | None, **changes: Any) -> AsyncIterator[Any]:
        local = LocalWorkers(workers or [worker])
        app = await build_front(cluster_settings, local, worker, **changes)
        async with open_client(app) as client:
            yield client, local, app.state.segmenter

    return open_it
