"""The formats of Prometheus: which one a request asks for, and its encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

_OPENMETRICS = "application/openmetrics-text"


def choose_format(accept: str) -> tuple[Callable[[Iterable[Metric]], bytes], str]:
    """Encoder and content type of an answer.

    Args:
        accept: The request's header. OpenMetrics if it comes first there, else the text format;
            parameters do not count, as there is one version of each.
    """
    encode, content_type = choose_encoder(_find_format(accept))
    return lambda metrics: encode(_Collected(metrics)), content_type


def _find_format(accept: str) -> str:
    """`_OPENMETRICS`, or nothing for the text format."""
    for item in accept.lower().split(","):
        media_type = item.partition(";")[0].strip()
        if media_type in (_OPENMETRICS, "text/plain"):
            return media_type.replace("text/plain", "")
    return ""


class _Collected(Collector):
    """Metrics that have been collected, for an encoder."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics
