"""Triton's inference statistics, from the metrics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from prometheus_client import Metric
from pydantic import BaseModel

from service.protocol import Segmenter

_NS = 1_000_000_000
_STAGES = {
    "success": ("total",),
    "queue": ("queue",),
    "compute_input": ("decode",),
    "compute_infer": ("infer",),
    "compute_output": ("postprocess", "encode"),
}
"""The stages of an image that make up each of Triton's times."""
_IMAGES, _ERRORS = "solo_images_total", "solo_image_errors_total"
_CALLS, _STAGE_SECONDS = "solo_batch_size_count", "solo_stage_duration_seconds_sum"


class Duration(BaseModel):
    """How often something was done, and how long it took in all, nanoseconds."""

    count: int = 0
    ns: int = 0


class InferDurations(BaseModel):
    """Images by what became of them, and their times by stage; failures are not timed."""

    success: Duration = Duration()
    fail: Duration = Duration()
    queue: Duration = Duration()
    compute_input: Duration = Duration()
    compute_infer: Duration = Duration()
    compute_output: Duration = Duration()
    cache_hit: Duration = Duration()
    cache_miss: Duration = Duration()


class ModelStats(BaseModel):
    """A version's statistics since the start of the server, or since it is served.

    Attributes:
        last_inference: Not known: 0.
        inference_count: Images answered with a result.
        execution_count: Engine calls.
    """

    name: str
    version: str
    last_inference: int = 0
    inference_count: int
    execution_count: int
    inference_stats: InferDurations
    batch_stats: list[Duration] = []


class StatisticsResponse(BaseModel):
    """Answer of GET /v2/models/stats."""

    model_stats: list[ModelStats]


async def read_statistics(
    segmenter: Segmenter, name: str | None = None, version: int | None = None
) -> list[ModelStats]:
    """The statistics of each version that is served, of one model or of all.

    Args:
        segmenter: The application's.
        name: None: all models.
        version: Of the model; None: all that are served.

    Raises:
        UnknownModel, UnknownVersion, ModelUnavailable, EngineRestarting: See `Segmenter.find`.
    """
    if name is not None:
        segmenter.find(name, version)
    asked = sorted(
        (model.name, model.version)
        for model in segmenter.models
        if name in (None, model.name) and version in (None, model.version)
    )
    values = _sum_samples(await segmenter.metrics.collect_all_processes())
    return [_describe(*model, values) for model in asked]


def _sum_samples(metrics: list[Metric]) -> Mapping[tuple[str, ...], float]:
    """The samples that are needed, by name, model, version and stage; of all processes together."""
    values: dict[tuple[str, ...], float] = defaultdict(float)
    for metric in metrics:
        for sample in metric.samples:
            if sample.name in (_IMAGES, _ERRORS, _CALLS, _STAGE_SECONDS):
                labels = (sample.labels.get(label, "") for label in ("model", "version", "stage"))
                values[sample.name, *labels] += sample.value
    return values


def _describe(name: str, version: int, values: Mapping[tuple[str, ...], float]) -> ModelStats:
    def value_of(sample: str, stage: str = "") -> float:
        return values.get((sample, name, str(version), stage), 0.0)

    images = round(value_of(_IMAGES))
    durations = {
        field: Duration(
            count=images, ns=round(_NS * sum(value_of(_STAGE_SECONDS, s) for s in stages))
        )
        for field, stages in _STAGES.items()
    }
    return ModelStats(
        name=name,
        version=str(version),
        inference_count=images,
        execution_count=round(value_of(_CALLS)),
        inference_stats=InferDurations(fail=Duration(count=round(value_of(_ERRORS))), **durations),
    )
