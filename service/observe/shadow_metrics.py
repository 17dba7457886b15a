"""Instruments of versions that are compared with the served one."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from pipeline.answer_match import AnswerMatch
from service.observe.version_series import VersionSeries

_LABELS = ["model", "version"]
_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 1.0)
_DIFFERENCES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0)
OUTCOMES = ("compared", "failed", "dropped")


class ShadowMetrics:
    """Series of a shadow exist from its start; their label `version` is the shadow's.

    Args:
        registry: Of the server's metrics.
        versions: Bounds how long a shadow's series stay after its end.
    """

    def __init__(self, registry: CollectorRegistry, versions: VersionSeries) -> None:
        self._versions = versions
        self.images = Counter(
            "solo_shadow_images_total",
            "Images chosen for the shadow, by outcome",
            [*_LABELS, "outcome"],
            registry=registry,
        )
        self.instances = Counter(
            "solo_shadow_instances_total",
            "Instances: matched, or found by one version only",
            [*_LABELS, "kind"],
            registry=registry,
        )
        self.agreement = Histogram(
            "solo_shadow_agreement",
            "Panoptic quality of an image",
            _LABELS,
            buckets=_RATIOS,
            registry=registry,
        )
        self.iou = Histogram(
            "solo_shadow_iou", "Mask IoU of a pair", _LABELS, buckets=_RATIOS, registry=registry
        )
        self.score_difference = Histogram(
            "solo_shadow_score_difference",
            "Absolute difference of the scores of a pair",
            _LABELS,
            buckets=_DIFFERENCES,
            registry=registry,
        )
        self.decisions = Counter(
            "solo_shadow_decisions_total",
            "Shadows promoted or rejected",
            ["model", "decision"],
            registry=registry,
        )
        self.running = Gauge(
            "solo_shadow_running",
            "1 for each version that is compared with the served one",
            _LABELS,
            registry=registry,
        )
        versions.bound(
            [
                *(self.images, self.instances, self.agreement, self.iou),
                *(self.score_difference, self.running),
            ]
        )

    def begin(self, name: str, version: int) -> None:
        """A shadow runs from now on."""
        self._versions.begin(name, version)
        self.running.labels(name, version).set(1)
        for outcome in OUTCOMES:
            self.images.labels(name, version, outcome)

    def end(self, name: str, version: int) -> None:
        """A shadow has ended; called once for each `begin`."""
        self.running.labels(name, version).set(0)
        self._versions.end(name, version)

    def add(self, name: str, version: int, agreement: AnswerMatch) -> None:
        """Counts an image that was compared."""
        self.images.labels(name, version, "compared").inc()
        self.agreement.labels(name, version).observe(agreement.quality)
        for iou in agreement.ious:
            self.iou.labels(name, version).observe(iou)
        for difference in agreement.score_differences:
            self.score_difference.labels(name, version).observe(abs(difference))
        kinds = ("matched", "served_only", "shadow_only")
        counts = (len(agreement.ious), *agreement.unmatched)
        for kind, count in zip(kinds, counts, strict=True):
            self.instances.labels(name, version, kind).inc(count)
