"""Triton's inference statistics, from the metrics.

Metrics are of a model, all its versions together; so are the statistics.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from prometheus_client import Metric
from pydantic import BaseModel

from service.errors import InvalidParameter
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
    """A model's statistics since the start of the server.

    Attributes:
        version: Empty if several are served: they are counted together.
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
    """The statistics of one model, or of all that are served.

    Args:
        segmenter: The application's.
        name: None: all models.
        version: Of the model; None: all of them.

    Raises:
        UnknownModel, UnknownVersion, ModelUnavailable, EngineRestarting: See `Segmenter.find`.
        InvalidParameter: A version is asked for, and several are served.
    """
    versions: dict[str, list[int]] = {}
    for model in segmenter.models:
        versions.setdefault(model.name, []).append(model.version)
    if name is not None:
        segmenter.find(name, version)
        if version is not None and len(versions[name]) > 1:
            raise InvalidParameter(
                f"version: the versions {versions[name]} of model {name!r} are counted together; "
                "ask for the model's statistics"
            )
        versions = {name: versions[name]}
    values = _sum_samples(await segmenter.metrics.collect_all_processes())
    return [_describe(model, found, values) for model, found in sorted(versions.items())]


def _sum_samples(metrics: list[Metric]) -> Mapping[tuple[str, str, str], float]:
    """The samples that are needed, by name, model and stage; of all processes together."""
    values: dict[tuple[str, str, str], float] = defaultdict(float)
    for metric in metrics:
        for sample in metric.samples:
            if sample.name in (_IMAGES, _ERRORS, _CALLS, _STAGE_SECONDS):
                key = sample.name, sample.labels["model"], sample.labels.get("stage", "")
                values[key] += sample.value
    return values


def _describe(
    name: str, versions: list[int], values: Mapping[tuple[str, str, str], float]
) -> ModelStats:
    images = round(values.get((_IMAGES, name, ""), 0))
    durations = {
        field: Duration(
            count=images,
            ns=round(_NS * sum(values.get((_STAGE_SECONDS, name, s), 0.0) for s in stages)),
        )
        for field, stages in _STAGES.items()
    }
    failed = Duration(count=round(values.get((_ERRORS, name, ""), 0)))
    return ModelStats(
        name=name,
        version=str(versions[0]) if len(versions) == 1 else "",
        inference_count=images,
        execution_count=round(values.get((_CALLS, name, ""), 0)),
        inference_stats=InferDurations(fail=failed, **durations),
    )
