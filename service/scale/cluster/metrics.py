"""The metrics of a whole application: whichever front is asked answers for all processes.

Requests and admission are counted at the fronts, where a request that was tried twice is one
request; images, stages and engines at the workers. A label `replica` tells the processes apart.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from prometheus_client import Counter, Metric
from prometheus_client.samples import Sample

from service.engines.state import EngineState
from service.observe.metrics import Metrics
from service.protocol import ModelState
from service.scale.merged_metrics import MergedMetrics, Report


class FrontMetrics(MergedMetrics):
    """The instruments of a front, which shows those of all processes.

    Args:
        collect_all: Asks every process, this one too.
    """

    def __init__(self, collect_all: Callable[[], Awaitable[Sequence[Report]]]) -> None:
        super().__init__(collect_all)
        self.retries = Counter(
            "solo_cluster_retries_total",
            "Calls sent to another worker because one was lost or could not do it",
            registry=self._registry,
        )

    def describe_models(self, models: Sequence[ModelState]) -> None:
        """Shows what the workers serve, in place of what was shown before."""
        for gone in self._engines.keys() - {(model.name, model.version) for model in models}:
            self.remove_model(*gone)
        for model in models:
            engine, asked = partial(_engine_of, model), model.asked_precision
            self.add_model(model.name, model.version, engine, model.max_batch, asked)


async def report_front(metrics: Metrics) -> Report:
    """A front's metrics without those of its models and engines, which are elsewhere."""
    return name_process(), _filter(await metrics.collect(), lambda s: not _is_of_engine(s))


async def report_worker(metrics: Metrics) -> Report:
    """A worker's metrics without those of requests, which it does not see."""
    collected = await metrics.collect()
    return name_process(), _filter(
        collected, lambda s: _is_of_engine(s) or not s.name.startswith("solo_")
    )


def _engine_of(model: ModelState) -> EngineState:
    return model.engine


def name_process() -> str:
    """What tells this process from the others of a cluster."""
    return f"{platform.node()}:{os.getpid()}"


def _is_of_engine(sample: Sample) -> bool:
    return "model" in sample.labels or sample.name.startswith(("solo_gpu_", "solo_repository_"))


def _filter(metrics: Sequence[Metric], keep: Callable[[Sample], bool]) -> list[Metric]:
    kept = []
    for metric in metrics:
        metric.samples = [sample for sample in metric.samples if keep(sample)]
        if metric.samples:
            kept.append(metric)
    return kept
