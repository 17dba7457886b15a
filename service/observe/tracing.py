"""OpenTelemetry traces, off unless a collector is named.

A request's spans are made when it has been answered, from the times that were taken anyway: a
server span, below it one for each image, below that one for each stretch in which the image was
in a stage. What no stage covers was spent in queues. OpenTelemetry's SDK and exporter are imported
only where tracing is asked for.
"""

from __future__ import annotations

import asyncio
import logging
import os
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
_FLUSH_S = 3.0
"""How long the end of the server waits for a collector."""


@dataclass(frozen=True)
class TracedImage:
    """When one image was where.

    Attributes:
        model: Who segmented it.
        whole: From the request's body being there to the image's answer.
        stages: By stage, when the image was in it.
    """

    model: str
    whole: Interval
    stages: Mapping[str, Sequence[Interval]]


@dataclass(frozen=True)
class TracedRequest:
    """A request that was answered.

    Attributes:
        headers: Its own; `traceparent` names the span of the client.
        attributes: Of its span.
        name: Of its span.
        ran: When it came and when it was answered.
        status: Of the answer.
        images: Those that got a result.
    """

    headers: Mapping[str, str]
    attributes: Mapping[str, str | int]
    name: str
    ran: Interval
    status: int
    images: Sequence[TracedImage]


_images: ContextVar[list[TracedImage] | None] = ContextVar("traced_images", default=None)


def collect_images() -> list[TracedImage]:
    """A list that gets the images noted from now on in this task and those that it starts."""
    images: list[TracedImage] = []
    _images.set(images)
    return images


def note_image(model: str, whole: Interval, stages: Mapping[str, Sequence[Interval]]) -> None:
    """Notes an image for the request's trace; nothing happens where nobody collects."""
    images = _images.get()
    if images is not None:
        images.append(TracedImage(model, whole, stages))


class Tracer:
    """Makes spans of requests.

    Args:
        provider: Of OpenTelemetry's SDK; the tracer shuts it down.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("solo-serve")
        self._propagator = TraceContextTextMapPropagator()

    def record(self, request: TracedRequest) -> str | None:
        """Makes a request's spans.

        Returns:
            The trace's id; None if the trace is not kept.
        """
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        # Spans want the time of day; the clock that was used for the times cannot jump.
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
        """Sends what is left; a collector that does not answer is not waited for long."""
        ending = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        ending.start()
        await asyncio.to_thread(ending.join, _FLUSH_S)
        if ending.is_alive():
            logger.warning("the last traces could not be sent within %s s", _FLUSH_S)


def _to_ns(monotonic_s: float, epoch_ns: int) -> int:
    return epoch_ns + round(monotonic_s * 1e9)


def build_tracer(endpoint: str | None, version: str) -> Tracer | None:
    """The tracer, or None if no collector is named.

    Args:
        endpoint: The collector's address, without a path of its own; None takes that of
            OpenTelemetry's own variables, which also give everything else.
        version: Of the server.

    Raises:
        StartupError: There is an endpoint, but the extra `tracing` is not installed.
    """
    if endpoint is None and not any(os.environ.get(name) for name in ENDPOINT_VARIABLES):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        reason = f"tracing needs pip install 'solo-serve[tracing]': {error}"
        if endpoint is not None:
            raise StartupError(reason) from error
        logger.warning("no traces are sent: %s", reason)  # the variables may be meant for others
        return None
    url = None if endpoint is None else endpoint.rstrip("/") + "/v1/traces"
    own = Resource.create({"service.name": "solo-serve", "service.version": version})
    # Ending is the server's, which does not wait for ever.
    provider = TracerProvider(
        resource=own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    return Tracer(provider)
