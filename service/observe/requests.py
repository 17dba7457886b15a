"""What is written of a request that was answered: metrics, a line in the log, a trace."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from service.observe.metrics import WORK_ROUTES, Metrics
from service.observe.timing import Interval
from service.observe.tracing import TracedImage, TracedRequest, Tracer


@dataclass(frozen=True, kw_only=True)
class AnsweredRequest:
    """A request that was answered.

    Attributes:
        route: Its template, for labels.
        method: Of HTTP.
        path: As sent.
        request_id: Its id.
        status: Of HTTP; of another protocol the one that HTTP has for the same error.
        ran: Arrival and end of the response.
        headers: `traceparent` gives the parent span; names in lower case.
        attributes: Of its span.
        images: That got a result.
        is_cut: Whether its client left before the end of its body.
    """

    route: str
    method: str
    path: str
    request_id: str
    status: int
    ran: Interval
    headers: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, str] = field(default_factory=dict)
    images: Sequence[TracedImage] = ()
    is_cut: bool = False


def record(
    request: AnsweredRequest, metrics: Metrics, tracer: Tracer | None, logger: logging.Logger
) -> None:
    """Counts a request, traces it if it was for segmentation, and logs one line."""
    route, method, status = request.route, request.method, request.status
    seconds, is_work = request.ran[1] - request.ran[0], route in WORK_ROUTES
    metrics.requests.labels(route, method, str(status)).inc()
    line = {
        "request_id": request.request_id,
        "method": method,
        "path": request.path,
        "status": status,
        "duration_ms": round(seconds * 1e3, 1),
    }
    exemplar = None
    if tracer is not None and is_work:
        trace_id = tracer.record(_describe(request))
        if trace_id is not None:
            line["trace_id"] = trace_id
            exemplar = {"trace_id": trace_id}
    metrics.request_seconds.labels(route, method).observe(seconds, exemplar)
    logger.log(
        logging.INFO if is_work and not request.is_cut else logging.DEBUG,
        "%s %s %d %.1f ms id=%s",
        method,
        request.path,
        status,
        seconds * 1e3,
        request.request_id,
        extra=line,
    )


def _describe(request: AnsweredRequest) -> TracedRequest:
    """What a trace says of a request, in the words of OpenTelemetry's conventions."""
    attributes = {
        "http.request.method": request.method,
        "http.route": request.route,
        "url.path": request.path,
        "url.scheme": "http",
        "solo.request_id": request.request_id,
        **request.attributes,
    }
    name = f"{request.method} {request.route}"
    return TracedRequest(
        request.headers, attributes, name, request.ran, request.status, request.images
    )
