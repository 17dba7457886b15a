"""Metrics of several processes as one answer: whichever is asked answers for all.

A label `replica` tells the processes apart.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from service.observe.metrics import Metrics

Report = tuple[str, list[Metric]]
"""A process's name and its metrics."""


class MergedMetrics(Metrics):
    """The instruments of a process that shows those of all.

    Args:
        collect_all: Asks every process, this one too.
    """

    def __init__(self, collect_all: Callable[[], Awaitable[Sequence[Report]]]) -> None:
        super().__init__()
        self._collect_all = collect_all

    async def answer(self, accept: str) -> tuple[bytes, str]:
        """Body and content type, with the samples of every process."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Merged(await self._collect_all()))
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type


class _Merged(Collector):
    """Each family once, with the samples of all processes."""

    def __init__(self, reports: Sequence[Report]) -> None:
        self._reports = reports

    def collect(self) -> Iterator[Metric]:
        """Adds the label `replica` to each sample."""
        families: dict[str, Metric] = {}
        for replica, metrics in self._reports:
            for metric in metrics:
                family = families.setdefault(
                    metric.name, Metric(metric.name, metric.documentation, metric.type)
                )
                family.samples += [
                    sample._replace(labels={**sample.labels, "replica": replica})
                    for sample in metric.samples
                ]
        yield from families.values()
