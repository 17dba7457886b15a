"""Every Prometheus name in one place; seconds, pixels and counts.

A `Metrics` owns its registry, so that two servers in one process do not share numbers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Metric,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

from service.engines.base import Precision
from service.engines.state import EngineState
from service.observe.exposition import choose_format
from service.observe.gpus import GpuCollector
from service.observe.job_metrics import JobMetrics
from service.observe.shadow_metrics import ShadowMetrics
from service.observe.shared import SharedCalls
from service.observe.version_series import VersionSeries

if TYPE_CHECKING:
    from service.work.admission import Admission
    from service.work.request import Outcome

STAGES = ("decode", "queue", "infer", "postprocess", "encode", "total")
WORK_ROUTES = (
    *("/segment", "/v2/models/{name}/infer"),
    "/v2/models/{name}/versions/{version}/infer",
    *(f"/inference.GRPCInferenceService/Model{kind}" for kind in ("Infer", "StreamInfer")),
)
"""The routes that segment; dashboard and alert rules count requests of these alone."""
PIXELS = ("image", "padding")
CANCELLATIONS = ("client_left", "deadline")
REJECTIONS = (
    *("queue_canvases", "client_share", "draining", "engine_restarting", "body_too_large"),
    *("unauthorized", "wrong_keys", "key_canvases", "key_rate", "connections", "body_timeout"),
    *("body_bytes", "head_timeout", "head_too_large", "invalid_request", "key_job_files"),
)

# An edge stands at each objective: 0.4 s for a 256 x 256 image on two cores, 0.5 s of the alerts.
_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3),
    *(0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0),
)
_ImageSeries = tuple[Counter, Counter, Counter, dict[str, Histogram]]
_BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class Metrics:
    """The server's instruments; the attributes' help texts are what /metrics shows."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each
        registry = CollectorRegistry()
        self._registry = registry
        self._engines: dict[
            tuple[str, int], tuple[Callable[[], EngineState], Precision | None]
        ] = {}
        self._series: dict[tuple[str, int], _ImageSeries] = {}
        self._gpus: GpuCollector | None = None
        self._followed: dict[Gauge, Callable[[], float]] = {}
        self._collecting = asyncio.Lock()
        self._answers = SharedCalls[bytes]()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self.stage_seconds = Histogram(
            "solo_stage_duration_seconds",
            "Time of one image in a stage; the stages add up to total",
            ["model", "version", "stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.request_seconds = Histogram(
            "solo_request_duration_seconds",
            "Time of one request, the upload of its body included",
            ["route", "method"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "solo_batch_size",
            "Canvases in one engine call",
            ["model", "version"],
            buckets=_BATCH_SIZES,
            registry=registry,
        )
        self._versions = VersionSeries()
        self.shadow = ShadowMetrics(registry, self._versions)
        self._build_counters(registry)
        self._versions.bound(
            [
                *(self.stage_seconds, self.batch_size, self.images, self.canvases),
                *(self.instances, self.image_errors),
            ]
        )
        self._build_gauges(registry)
        self.jobs = JobMetrics(registry)
        # Series that exist from the start have a rate from the first request on.
        for reason in REJECTIONS:
            self.rejections.labels(reason)
        for route in WORK_ROUTES:
            self.requests.labels(route, "POST", "200")
            self.request_seconds.labels(route, "POST")

    def _build_counters(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "solo_requests_total",
            "Requests answered",
            ["route", "method", "status"],
            registry=registry,
        )
        self.images = Counter(
            "solo_images_total",
            "Images answered with a result",
            ["model", "version"],
            registry=registry,
        )
        self.canvases = Counter(
            "solo_canvases_total",
            "Canvases of images answered with a result",
            ["model", "version"],
            registry=registry,
        )
        self.image_errors = Counter(
            "solo_image_errors_total",
            "Images answered with an error",
            ["model", "version", "code"],
            registry=registry,
        )
        self.instances = Counter(
            "solo_instances_total", "Instances returned", ["model", "version"], registry=registry
        )
        self.rejections = Counter(
            "solo_rejections_total", "Requests rejected", ["reason"], registry=registry
        )
        self.engine_failures = Counter(
            "solo_engine_failures_total", "Engine calls that raised", ["model"], registry=registry
        )
        self.pixels = Counter(
            "solo_engine_pixels_total",
            "Pixels in engine calls: of images, and padding of their canvases",
            ["model", "kind"],
            registry=registry,
        )
        self.engine_restarts = Counter(
            "solo_engine_restarts_total",
            "Engines that failed and were replaced",
            ["model"],
            registry=registry,
        )
        self.cancelled_images = Counter(
            "solo_cancelled_images_total",
            "Images removed because their client left, or because its deadline passed",
            ["model", "reason"],
            registry=registry,
        )

    def _build_gauges(self, registry: CollectorRegistry) -> None:
        self.queue_images = Gauge(
            "solo_queue_images", "Images admitted and not finished", registry=registry
        )
        self.queue_canvases = Gauge(
            "solo_queue_canvases", "Canvases admitted and not finished", registry=registry
        )
        self.queue_limit_canvases = Gauge(
            "solo_queue_limit_canvases", "Canvases that may be in flight", registry=registry
        )
        self.batch_limit = Gauge(
            "solo_batch_limit_canvases",
            "Canvases that may be in one engine call",
            ["model"],
            registry=registry,
        )
        self.in_flight_requests = Gauge(
            "solo_in_flight_requests", "Requests for segmentation in flight", registry=registry
        )
        self.request_body_bytes = Gauge(
            "solo_request_body_bytes",
            "Bytes of request bodies in memory, those still arriving included",
            registry=registry,
        )
        self.ready = Gauge("solo_ready", "1 if new requests are accepted", registry=registry)
        self.engine_up = Gauge(
            "solo_engine_up", "1 while the model's engine works", ["model"], registry=registry
        )
        self.model_info = Gauge(
            "solo_model_info",
            "1 for each model that is served",
            ["model", "version", "backend", "device", "precision"],
            registry=registry,
        )
        self.engine_canvas_seconds = Gauge(
            "solo_engine_canvas_seconds",
            "Time of one canvas in the engines that were timed to choose one",
            ["model", "version", "backend", "precision"],
            registry=registry,
        )
        self.engine_build_progress = Gauge(
            "solo_engine_build_progress",
            "How much of a model's engine is built, 0..1; 1 if none is to be built",
            ["model"],
            registry=registry,
        )
        self.model_refused = Gauge(
            "solo_model_refused",
            "1 for each model of the repository that was refused",
            ["model"],
            registry=registry,
        )
        self.precision_fallback = Gauge(
            "solo_model_precision_fallback",
            "1 for each served model whose engine has another precision than was asked for",
            ["model", "version", "asked"],
            registry=registry,
        )
        self.repository_readable = Gauge(
            "solo_repository_readable",
            "0 while the model repository cannot be read; what was loaded is served",
            registry=registry,
        )
        self.repository_readable.set(1)

    def add_model(
        self,
        name: str,
        version: int,
        engine: Callable[[], EngineState],
        max_batch: int,
        asked_precision: Precision | None = None,
    ) -> None:
        """Announces a served model; its series exist from now on, at 0.

        Args:
            name: The model's.
            version: Of the model.
            engine: What serves it; asked again whenever the metrics are.
            max_batch: Most canvases in one call of it.
            asked_precision: None: the engine's.
        """
        if (name, version) not in self._engines:
            self._versions.begin(name, version)
            self._series.clear()  # its series may have been removed since they were looked up
        self._engines[name, version] = engine, asked_precision
        self.batch_limit.labels(name).set(max_batch)
        for stage in STAGES:
            self.stage_seconds.labels(name, version, stage)
        for family in (self.images, self.canvases, self.instances, self.batch_size):
            family.labels(name, version)
        for family in (self.engine_failures, self.engine_restarts):
            family.labels(name)
        for reason in CANCELLATIONS:
            self.cancelled_images.labels(name, reason)
        for kind in PIXELS:
            self.pixels.labels(name, kind)

    def remove_model(self, name: str, version: int) -> None:
        """A version is no longer served; `VersionSeries` bounds how long its counts stay."""
        if self._engines.pop((name, version), None) is not None:
            self._versions.end(name, version)

    def forget_model(self, name: str) -> None:
        """Removes the refusal of a model that is no longer in the repository."""
        with suppress(KeyError):
            self.model_refused.remove(name)

    def watch(self, admission: Admission) -> None:
        """Reads what is in flight from admission whenever the metrics are asked for."""
        self.follow(self.queue_images, lambda: admission.images)
        self.follow(self.queue_canvases, lambda: admission.canvases)
        self.queue_limit_canvases.set(admission.max_canvases)
        self.follow(self.in_flight_requests, lambda: admission.requests)

    def count_image(self, name: str, version: int, outcome: Outcome, *, timed: bool = True) -> None:
        """Counts an image that was answered with a result.

        Args:
            name: The model's.
            version: Of the model.
            outcome: The image's.
            timed: Whether its times count: those of an image that nobody waits for do not.
        """
        images, canvases, instances, stages = self._series_of(name, version)
        images.inc()
        canvases.inc(outcome.canvases)
        instances.inc(outcome.instances)
        if not timed:
            return
        for stage, seconds in vars(outcome.timing).items():
            stages[stage].observe(seconds)

    def _series_of(self, name: str, version: int) -> _ImageSeries:
        """A version's series of `count_image`; looking a series up takes longer than counting."""
        key = name, version
        if key not in self._series:
            self._versions.expect(name, version)
            self._series[key] = (
                self.images.labels(name, version),
                self.canvases.labels(name, version),
                self.instances.labels(name, version),
                {stage: self.stage_seconds.labels(name, version, stage) for stage in STAGES},
            )
        return self._series[key]

    def count_error(self, name: str, version: int, code: str) -> None:
        """Counts an image that was answered with an error."""
        self._versions.expect(name, version)
        self.image_errors.labels(name, version, code).inc()

    def watch_gpus(self, gpus: GpuCollector | None) -> None:
        """Shows what NVML says of the GPUs, if there are any."""
        self._gpus = gpus
        if gpus is not None:
            self._registry.register(gpus)

    def _update_engines(self) -> None:
        for gauge in (
            *(self.model_info, self.precision_fallback),
            *(self.engine_up, self.engine_build_progress, self.engine_canvas_seconds),
        ):
            gauge.clear()
        alive: dict[str, bool] = {}
        for (name, version), (engine, asked) in self._engines.items():
            state = engine()
            is_fallback = asked not in (None, state.precision)
            self.precision_fallback.labels(name, str(version), asked or state.precision).set(
                is_fallback
            )
            labels = (name, str(version), state.name, state.device, state.precision)
            self.model_info.labels(*labels).set(1)
            for candidate, seconds in state.canvas_s.items():
                timed = (name, str(version), *candidate.split(" ", 1))
                self.engine_canvas_seconds.labels(*timed).set(seconds)
            progress = 1.0 if state.build is None else state.build.progress
            self.engine_build_progress.labels(name).set(progress)
            alive[name] = alive.get(name, True) and state.is_alive
        for name, all_alive in alive.items():
            self.engine_up.labels(name).set(all_alive)

    def follow(self, gauge: Gauge, read: Callable[[], float]) -> None:
        """Has a gauge show what `read` returns in the event loop whenever metrics are asked for."""
        self._followed[gauge] = read

    async def collect(self) -> list[Metric]:
        """All metrics as of now, as objects."""
        async with self._collecting:
            if self._gpus is not None:
                await asyncio.to_thread(self._gpus.read)  # NVML may take its time
            self._update_engines()
            for gauge, read in self._followed.items():
                gauge.set(read())
            return await asyncio.to_thread(lambda: list(self._registry.collect()))

    async def collect_all_processes(self) -> list[Metric]:
        """The metrics of all processes that one answer shows, as objects."""
        shown = await self._collect_shown()
        return await asyncio.to_thread(lambda: list(shown()))

    async def answer(self, accept: str) -> tuple[bytes, str]:
        """All metrics as of now; requests that come at once share an answer.

        Args:
            accept: The request's header.

        Returns:
            Body and content type.
        """
        encode, content_type = choose_format(accept)
        return await self._answers.get(content_type, partial(self._write, encode)), content_type

    async def _write(self, encode: Callable[[Iterable[Metric]], bytes]) -> bytes:
        shown = await self._collect_shown()
        return await asyncio.to_thread(lambda: encode(shown()))

    async def _collect_shown(self) -> Callable[[], Iterable[Metric]]:
        """Collects what an answer shows; the result is called in a thread."""
        collected = await self.collect()
        return lambda: collected
