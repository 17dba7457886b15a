"""OpenTelemetry traces; disabled unless a collector endpoint is configured.

A request's spans are created after it has been answered, from the timestamps recorded for the
metrics: a server span, a child span per image, and below it a span per interval in a stage. Time
not covered by a stage was spent in queues. OpenTelemetry's SDK and exporter are imported only if
tracing is enabled.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.errors import StartupError
from service.observe.timing import Interval, merge_intervals

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

logger = logging.getLogger(__name__)

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
EXPORTER_VARIABLE = "OTEL_TRACES_EXPORTER"
_FLUSH_TIMEOUT_S = 3.0
"""How long the shutdown waits for the last spans to be exported."""


@dataclass(frozen=True)
class TracedImage:
    """Timestamps of one image.

    Attributes:
        model: Name of the model.
        whole: From the end of the request's body to the image's result.
        stages: Intervals by stage.
    """

    model: str
    whole: Interval
    stages: Mapping[str, Sequence[Interval]]


@dataclass(frozen=True)
class TracedRequest:
    """An answered request.

    Attributes:
        headers: Request headers; `traceparent` gives the parent span.
        attributes: Span attributes.
        name: Span name.
        ran: Arrival and end of the response.
        status: HTTP status.
        images: Images that got a result.
    """

    headers: Mapping[str, str]
    attributes: Mapping[str, str | int]
    name: str
    ran: Interval
    status: int
    images: Sequence[TracedImage]


_images: ContextVar[list[TracedImage] | None] = ContextVar("traced_images", default=None)


def collect_images() -> list[TracedImage]:
    """A list that receives the images noted from now on in this task and its child tasks."""
    images: list[TracedImage] = []
    _images.set(images)
    return images


def note_image(model: str, whole: Interval, stages: Mapping[str, Sequence[Interval]]) -> None:
    """Adds an image to the current request's trace; no-op without `collect_images`."""
    images = _images.get()
    if images is not None:
        images.append(TracedImage(model, whole, stages))


class Tracer:
    """Records requests as spans.

    Args:
        provider: OpenTelemetry's provider; `close` shuts it down.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("solo-serve")
        self._propagator = TraceContextTextMapPropagator()

    def record(self, request: TracedRequest) -> str | None:
        """Creates the spans of a request.

        Returns:
            The trace id in hexadecimal; None if the trace is not sampled.
        """
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        # Spans need wall-clock times; the intervals are of the monotonic clock.
        epoch_ns = time.time_ns() - time.monotonic_ns()
        span = self._tracer.start_span(
            request.name,
            context=self._propagator.extract(request.headers, context=Context()),
            kind=SpanKind.SERVER,
            attributes={**request.attributes, "http.response.status_code": request.status},
            start_time=_to_ns(request.ran[0], epoch_ns),
        )
        if request.status >= 500:
            span.set_attribute("error.type", str(request.status))
            span.set_status(StatusCode.ERROR)
        if span.is_recording():
            for image in request.images:
                self._record_image(image, set_span_in_context(span, Context()), epoch_ns)
        span.end(_to_ns(request.ran[1], epoch_ns))
        context = span.get_span_context()
        return f"{context.trace_id:032x}" if context.trace_flags.sampled else None

    def _record_image(self, image: TracedImage, parent: Context, epoch_ns: int) -> None:
        from opentelemetry.trace import set_span_in_context

        span = self._tracer.start_span(
            "image",
            context=parent,
            attributes={"solo.model": image.model},
            start_time=_to_ns(image.whole[0], epoch_ns),
        )
        inside = set_span_in_context(span, parent)
        for stage, intervals in image.stages.items():
            for started_s, ended_s in merge_intervals(intervals):
                child = self._tracer.start_span(
                    stage, context=inside, start_time=_to_ns(started_s, epoch_ns)
                )
                child.end(_to_ns(ended_s, epoch_ns))
        span.end(_to_ns(image.whole[1], epoch_ns))

    async def close(self) -> None:
        """Exports the remaining spans; gives up after a timeout if the collector is down."""
        thread = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        thread.start()
        await asyncio.to_thread(thread.join, _FLUSH_TIMEOUT_S)
        if thread.is_alive():
            logger.warning("the last traces could not be exported within %s s", _FLUSH_TIMEOUT_S)


def _to_ns(monotonic_s: float, epoch_ns: int) -> int:
    return epoch_ns + round(monotonic_s * 1e9)


def build_tracer(endpoint: str | None, version: str) -> Tracer | None:
    """Builds the tracer, or returns None if no collector is configured.

    Args:
        endpoint: Base URL of the collector, without a path; None uses OpenTelemetry's OTEL_*
            variables, which also configure everything else.
        version: Version of the server.

    Raises:
        StartupError: `endpoint` is set, but the extra `tracing` is not installed; or a variable
            has a value that cannot be followed.
    """
    if endpoint is None:
        named = any(os.environ.get(name) for name in ENDPOINT_VARIABLES)
        if not named or os.environ.get(EXPORTER_VARIABLE, "").strip() == "none":
            return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        reason = f"tracing requires the extra 'tracing' of solo-serve: {error}"
        if endpoint is not None:
            raise StartupError(reason) from error
        # Only a warning: OTEL_* variables may be set for other processes.
        logger.warning("tracing is disabled: %s", reason)
        return None
    _check_variables(endpoint)
    url = None if endpoint is None else endpoint.rstrip("/") + "/v1/traces"
    own = Resource.create({"service.name": "solo-serve", "service.version": version})
    try:
        # `close` shuts the provider down, with a timeout.
        provider = TracerProvider(
            resource=own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    except ValueError as error:
        raise StartupError(f"tracing: an OTEL_* variable is invalid: {error}") from error
    return Tracer(provider)


def _check_variables(endpoint: str | None) -> None:
    """Refuses what OpenTelemetry's exporter would ignore."""
    _check(PROTOCOL_VARIABLES, "http/protobuf", "to the collector's HTTP port, usually 4318")
    if endpoint is None:
        _check((EXPORTER_VARIABLE,), "otlp", "or none")
        _check(ENDPOINT_VARIABLES, r"https?://.+", "the address of the collector")


def _check(names: Sequence[str], expected: str, about: str) -> None:
    """Raises StartupError if the first variable that is set has another value."""
    found = ((name, os.environ.get(name, "").strip()) for name in names)
    name, value = next(((name, value) for name, value in found if value), ("", ""))
    if value and not re.fullmatch(expected, value, re.IGNORECASE):
        raise StartupError(f"tracing: {name}={value} is not possible, only {expected} ({about})")
