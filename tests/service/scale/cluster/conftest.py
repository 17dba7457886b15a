"""Fronts and workers in one process, without Ray."""

from __future__ import annotations

import pickle
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from service.scale.cluster.messages import Answer, Call, Description, WorkerLost
from service.scale.cluster.settings import ClusterSettings
from service.scale.cluster.worker import Worker, start_segmenter
from service.scale.merged_metrics import Report


@dataclass
class LocalWorkers:
    """Workers that are asked in turn; what travels is pickled, as it is between machines.

    Attributes:
        workers: The workers, or what they answer whatever they are asked; None is one that dies.
        calls: All calls.
    """

    workers: Sequence[Worker | Answer | None]
    calls: list[Call] = field(default_factory=list)

    async def segment(self, call: Call) -> Answer:
        worker = self.workers[len(self.calls) % len(self.workers)]
        self.calls.append(pickle.loads(pickle.dumps(call)))
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
