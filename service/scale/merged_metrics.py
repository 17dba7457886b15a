"""Metrics of several processes as one answer: whichever is asked answers for all.

A label `replica` tells the processes apart.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial

from prometheus_client import Metric

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

    async def _collect_shown(self) -> Callable[[], Iterable[Metric]]:
        return partial(_merge, await self._collect_all())


def _merge(reports: Sequence[Report]) -> Iterable[Metric]:
    """Each family once, with the samples of all processes; adds the label `replica` to each."""
    families: dict[str, Metric] = {}
    for replica, metrics in reports:
        for metric in metrics:
            family = families.setdefault(
                metric.name, Metric(metric.name, metric.documentation, metric.type)
            )
            family.samples += [
                sample._replace(labels={**sample.labels, "replica": replica})
                for sample in metric.samples
            ]
    return families.values()
