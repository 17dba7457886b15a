"""Bounds the series that have the labels `model` and `version`.

Versions come and go for as long as the server runs; each has about 160 series.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Sequence

from prometheus_client.metrics import MetricWrapperBase

KEPT_ENDED = 4
"""Versions, of all models, whose series stay after they have ended: those that ended last."""


class VersionSeries:
    """Knows which versions are in use, and removes the series of those that ended long ago.

    The series of a version stay for some time after its end, because requests that began with it
    are counted when they finish, and because Prometheus has yet to read the last counts.
    """

    def __init__(self) -> None:
        self._families: list[MetricWrapperBase] = []
        self._users: Tally[tuple[str, int]] = Tally()
        self._ended: dict[tuple[str, int], None] = {}

    def bound(self, families: Sequence[MetricWrapperBase]) -> None:
        """Removes series of these families, too; they have the labels `model` and `version`."""
        self._families += families

    def begin(self, name: str, version: int) -> None:
        """A version is served, or compared with the served one; `end` is called once for each."""
        self._users[name, version] += 1
        self._ended.pop((name, version), None)

    def end(self, name: str, version: int) -> None:
        """A use of a version has ended; its series stay until `KEPT_ENDED` others have ended."""
        self._users[name, version] -= 1
        self._keep_ended(name, version)

    def expect(self, name: str, version: int) -> None:
        """Called before a version counts: one that does so late is the one that ended last."""
        self._keep_ended(name, version)

    def _keep_ended(self, name: str, version: int) -> None:
        key = name, version
        if self._users[key] > 0:
            return
        del self._users[key]
        self._ended.pop(key, None)
        self._ended[key] = None
        while len(self._ended) > KEPT_ENDED:
            oldest = next(iter(self._ended))
            del self._ended[oldest]
            labels = {"model": oldest[0], "version": str(oldest[1])}
            for family in self._families:
                family.remove_by_labels(labels)
