from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from service.errors import StartupError
from service.http.app import create_app
from service.models.repository import load_repository
from service.observe import tracing
from service.observe.tracing import (
    ENDPOINT_VARIABLES,
    Tracer,
    build_tracer,
    collect_images,
    note_image,
)
from service.settings import Settings
from service.work.image import ImageWork
from tests.service.conftest import OPTIONS, OpenClient
from tests.support.blob_model import draw_picture, encode_picture
from tests.support.collector import run_collector

PICTURE = encode_picture(draw_picture())
STAGES = ("decode", "infer", "postprocess", "encode")
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
OPENMETRICS = {"accept": "application/openmetrics-text; version=1.0.0"}
EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ENDPOINT_VARIABLES, "OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def kept() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
async def traced(
    settings: Settings, kept: InMemorySpanExporter, open_client: OpenClient
) -> AsyncIterator[httpx.AsyncClient]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    repository = load_repository(settings.model_repo, OPTIONS)
    async with open_client(create_app(settings, repository, Tracer(provider))) as client:
        yield client


def times(span: ReadableSpan) -> tuple[int, int]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time, span.end_time


def children(spans: tuple[ReadableSpan, ...], parent: ReadableSpan) -> list[ReadableSpan]:
    """The child spans of another one; they are within its time and trace."""
    found = [s for s in spans if s.parent and s.parent.span_id == parent.context.span_id]
    for span in found:
        assert span.context.trace_id == parent.context.trace_id
        assert times(parent)[0] <= times(span)[0] <= times(span)[1] <= times(parent)[1]
    return found


async def test_a_request_has_a_span_with_its_images_and_their_stages(
    traced: httpx.AsyncClient, kept: InMemorySpanExporter
) -> None:
    headers = {"x-request-id": "mine"}
    parts = [("images", PICTURE)] * 2
    assert (await traced.post("/segment", files=parts, headers=headers)).status_code == 200
    spans = kept.get_finished_spans()
    (server,) = [span for span in spans if span.parent is None]
    assert (server.name, server.kind) == ("POST /segment", SpanKind.SERVER)
    assert server.attributes == {
        "http.request.method": "POST",
        "http.route": "/segment",
        "http.response.status_code": 200,
        "url.path": "/segment",
        "url.scheme": "http",
        "solo.request_id": "mine",
    }
    images = children(spans, server)
    assert [image.name for image in images] == ["image", "image"]
    for image in images:
        assert image.attributes == {"solo.model": "blobs"}
        assert {stage.name for stage in children(spans, image)} == set(STAGES)


async def test_spans_and_histograms_have_the_same_times(
    traced: httpx.AsyncClient, kept: InMemorySpanExporter
) -> None:
    assert (await traced.post("/segment", content=PICTURE)).status_code == 200
    text = (await traced.get("/metrics")).text
    spans = kept.get_finished_spans()
    # The time of a stage equals the sum of its spans only if no other stage overlaps it.
    for stage, name in (("decode", "decode"), ("infer", "infer"), ("total", "image")):
        pattern = (
            f'solo_stage_duration_seconds_sum{{model="blobs",stage="{stage}",version="1"}} (.*)'
        )
        (counted,) = re.findall(pattern, text)
        taken = sum(times(span)[1] - times(span)[0] for span in spans if span.name == name)
        assert taken / 1e9 == pytest.approx(float(counted), abs=1e-6)


async def test_the_span_continues_the_clients_trace(
    traced: httpx.AsyncClient, kept: InMemorySpanExporter
) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"}
    await traced.post("/segment", content=PICTURE, headers=headers)
    (server,) = [span for span in kept.get_finished_spans() if span.kind is SpanKind.SERVER]
    assert server.parent is not None
    assert f"{server.context.trace_id:032x}" == TRACE_ID
    assert f"{server.parent.span_id:016x}" == SPAN_ID


@pytest.mark.parametrize("header", ["", "00-zz-11-01", f"00-{'0' * 32}-{SPAN_ID}-01"])
async def test_an_invalid_traceparent_starts_a_new_trace(
    traced: httpx.AsyncClient, kept: InMemorySpanExporter, header: str
) -> None:
    response = await traced.post("/segment", content=PICTURE, headers={"traceparent": header})
    assert response.status_code == 200
    assert len([span for span in kept.get_finished_spans() if span.parent is None]) == 1


async def test_a_trace_that_the_client_does_not_sample_is_not_exported(
    traced: httpx.AsyncClient, kept: InMemorySpanExporter
) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-00"}
    assert (await traced.post("/segment", content=PICTURE, headers=headers)).status_code == 200
    assert kept.get_finished_spans() == ()
    assert TRACE_ID not in (await traced.get("/metrics", headers=OPENMETRICS)).text


async def test_log_line_and_exemplar_have_the_trace_id(
    traced: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "service.http.middleware")
    headers = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"}
    await traced.post("/segment", content=PICTURE, headers=headers)
    (record,) = [r for r in caplog.records if r.name == "service.http.middleware"]
    assert vars(record)["trace_id"] == TRACE_ID
    exemplars = (await traced.get("/metrics", headers=OPENMETRICS)).text.splitlines()
    (line,) = [line for line in exemplars if TRACE_ID in line]
    assert line.startswith('solo_request_duration_seconds_bucket{le="')
    assert 'route="/segment"' in line
    assert TRACE_ID not in (await traced.get("/metrics")).text


@pytest.mark.parametrize(
    ("path", "body", "status", "is_error"),
    [
        ("/segment", b"no image", 415, False),
        ("/v2/models/cats/infer", b"{}", 404, False),
        ("/segment?version=1", PICTURE, 500, True),
    ],
)
async def test_only_server_errors_set_the_span_status(
    traced: httpx.AsyncClient,
    kept: InMemorySpanExporter,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: bytes,
    status: int,
    is_error: bool,
) -> None:
    def explode(*args: object) -> None:
        raise RuntimeError("broken")

    if is_error:
        monkeypatch.setattr(ImageWork, "open", explode)
    assert (await traced.post(path, content=body)).status_code == status
    (span,) = kept.get_finished_spans()
    assert span.attributes is not None
    assert span.attributes["http.response.status_code"] == status
    assert (span.status.status_code is StatusCode.ERROR) == is_error
    assert span.attributes.get("error.type") == ("500" if is_error else None)


async def test_probes_and_scrapes_are_not_traced(
    traced: httpx.AsyncClient, kept: InMemorySpanExporter
) -> None:
    for path in ("/metrics", "/healthz", "/v2/health/ready", "/v2/models", "/nothing"):
        await traced.get(path)
    assert kept.get_finished_spans() == ()


def test_images_are_noted_only_where_they_are_collected() -> None:
    tracing._images.set(None)
    note_image("nuclei", (0, 1), {})
    images = collect_images()
    note_image("nuclei", (1, 2), {"decode": [(1, 2)]})
    assert [image.whole for image in images] == [(1, 2)]


def test_disabled_tracing_imports_no_sdk() -> None:
    # FastAPI imports OpenTelemetry's API, but neither of these.
    script = (
        "import sys; from service.http.app import create_app;"
        "from service.settings import Settings;"
        "create_app(Settings(device='cpu'));"
        "heavy = ('opentelemetry.sdk', 'opentelemetry.exporter', 'requests');"
        "print([name for name in sys.modules if name.startswith(heavy)])"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
    assert done.stdout == b"[]\n", done.stderr


def test_without_a_collector_there_is_no_tracer() -> None:
    assert build_tracer(None, "1") is None


def test_an_endpoint_without_the_library_is_a_startup_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, EXPORTER, None)
    with pytest.raises(StartupError, match="requires the extra 'tracing'"):
        build_tracer("http://localhost:4318", "1")


@pytest.mark.parametrize("variable", ENDPOINT_VARIABLES)
def test_otel_variables_without_the_library_only_log_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, variable: str
) -> None:
    monkeypatch.setitem(sys.modules, EXPORTER, None)
    monkeypatch.setenv(variable, "http://localhost:4318")
    assert build_tracer(None, "1") is None
    assert "tracing is disabled" in caplog.text


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL=grpc"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "OTEL_EXPORTER_OTLP_PROTOCOL=http/json"),
        (
            {
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": " gRPC ",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            },
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=gRPC",
        ),
        ({"OTEL_TRACES_EXPORTER": "console"}, "OTEL_TRACES_EXPORTER=console"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4317"}, "ENDPOINT=collector:4317"),
        ({"OTEL_ATTRIBUTE_COUNT_LIMIT": "many"}, "OTEL_ATTRIBUTE_COUNT_LIMIT"),
    ],
)
def test_otel_variables_that_cannot_be_followed_are_startup_errors(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], named: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StartupError, match=named):
        build_tracer(None, "1")
    if "PROTOCOL" in named:
        with pytest.raises(StartupError, match=named):
            build_tracer("http://localhost:4318", "1")


@pytest.mark.parametrize(
    "variables",
    [
        {"OTEL_EXPORTER_OTLP_PROTOCOL": "HTTP/protobuf", "OTEL_TRACES_EXPORTER": "otlp"},
        {
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        },
        {"OTEL_EXPORTER_OTLP_PROTOCOL": ""},
    ],
)
async def test_otel_variables_that_fit_are_followed(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    tracer = build_tracer(None, "1")
    assert tracer is not None
    await tracer.close()
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert build_tracer(None, "1") is None


@pytest.mark.parametrize("by_variable", [True, False])
async def test_spans_reach_a_collector(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, open_client: OpenClient, by_variable: bool
) -> None:
    with run_collector() as collector:
        if by_variable:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
            monkeypatch.setenv("OTEL_SERVICE_NAME", "nuclei-server")
        else:
            settings = settings.model_copy(update={"otlp_endpoint": collector.url + "/"})
        repository = load_repository(settings.model_repo, OPTIONS)
        async with open_client(create_app(settings, repository)) as client:
            assert (await client.post("/segment", content=PICTURE)).status_code == 200
        # The shutdown has exported the remaining spans.
        assert set(collector.paths) == {"/v1/traces"}
        assert collector.services == {"nuclei-server" if by_variable else "solo-serve"}
        assert {span.name for span in collector.spans} >= {"POST /segment", "image", *STAGES}


async def test_a_hanging_collector_does_not_block_the_shutdown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()
    provider: Any = TracerProvider(shutdown_on_exit=False)
    monkeypatch.setattr(provider, "shutdown", released.wait)
    monkeypatch.setattr(tracing, "_FLUSH_TIMEOUT_S", 0.01)
    await Tracer(provider).close()
    assert "could not be exported" in caplog.text
    released.set()
