from __future__ import annotations

import asyncio
import gc
import json
import math
import re
import time

import httpx
import pytest
from fastapi import FastAPI

from pipeline.errors import DecodeError
from service.errors import STATUS_BY_CODE, ServiceError, StartupError, describe_error
from service.http.app import create_app
from service.settings import Settings
from service.work.request import ImageFile
from tests.service.conftest import OpenClient
from tests.support.blob_model import draw_picture, encode_picture

PICTURE = encode_picture(draw_picture())


def read_metrics(text: str) -> dict[str, float]:
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines}


async def test_unknown_paths_and_methods_have_the_error_shape(client: httpx.AsyncClient) -> None:
    response = await client.get("/nothing/here")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"
    response = await client.get("/segment")
    assert response.status_code == 405
    assert response.json()["error"]["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


async def test_an_unknown_method_is_answered_with_all_that_the_path_has(
    app: FastAPI, client: httpx.AsyncClient
) -> None:
    described = {path: {*map(str.upper, item)} for path, item in app.openapi()["paths"].items()}
    assert {"POST", "GET"} <= described["/v2/jobs"]
    described |= {path: {"GET"} for path in ("/", "/docs", "/openapi.json")}
    for path, methods in described.items():
        allowed = methods | ({"HEAD"} if "GET" in methods else set())
        for method in {"GET", "PUT", "PATCH", "DELETE", "POST", "BREW"} - allowed:
            response = await client.request(method, re.sub(r"{\w+}", "7", path))
            assert response.status_code == 405, (method, path)
            assert set(response.headers["allow"].split(", ")) == allowed, (method, path)


async def test_an_error_of_our_own_is_a_500_that_tells_nothing(
    app: FastAPI, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*args: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(app.state.segmenter, "use", explode)
    response = await client.post("/segment", content=PICTURE)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert response.headers["x-request-id"]
    monkeypatch.undo()
    assert (await client.post("/segment", content=PICTURE)).status_code == 200


async def test_request_ids_are_kept_if_they_are_sane(client: httpx.AsyncClient) -> None:
    response = await client.get("/healthz", headers={"x-request-id": "abc-123"})
    assert response.headers["x-request-id"] == "abc-123"
    response = await client.get("/healthz", headers={"x-request-id": "a b\tc" * 50})
    assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])


async def test_times_do_not_depend_on_how_exact_the_event_loops_clock_is(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uvloop's counts milliseconds; here it is worse."""
    monkeypatch.setattr(
        asyncio.get_running_loop(), "time", lambda: math.floor(time.monotonic() * 20) / 20
    )
    for _ in range(5):
        timing = (await client.post("/segment", content=PICTURE)).json()["timing_ms"]
        stages = sum(milliseconds for stage, milliseconds in timing.items() if stage != "total")
        assert 0 < stages <= timing["total"] + 0.01


async def test_metrics_count_exactly(client: httpx.AsyncClient) -> None:
    for _ in range(5):
        await client.post("/segment", files=[("images", PICTURE)] * 3)
    await client.post("/segment", content=b"text")
    await client.get("/nothing")
    found = read_metrics((await client.get("/metrics")).text)
    assert found['solo_images_total{model="blobs",version="1"}'] == 15
    assert found['solo_instances_total{model="blobs",version="1"}'] == 15
    assert (
        found['solo_image_errors_total{code="unsupported_format",model="blobs",version="1"}'] == 1
    )
    assert found['solo_requests_total{method="POST",route="/segment",status="200"}'] == 5
    assert found['solo_requests_total{method="POST",route="/segment",status="415"}'] == 1
    assert found['solo_requests_total{method="any",route="unmatched",status="404"}'] == 1
    assert (
        found[
            'solo_model_info{backend="onnxruntime",device="cpu",model="blobs",precision="fp32",'
            'version="1"}'
        ]
        == 1
    )
    assert found['solo_model_refused{model="broken"}'] == 1
    assert found['solo_batch_size_sum{model="blobs",version="1"}'] == 15
    sums = {
        stage: found[
            f'solo_stage_duration_seconds_sum{{model="blobs",stage="{stage}",version="1"}}'
        ]
        for stage in ("decode", "queue", "infer", "postprocess", "encode", "total")
    }
    assert 0 < sum(sums.values()) - sums["total"] <= sums["total"]
    assert found['solo_stage_duration_seconds_count{model="blobs",stage="total",version="1"}'] == 15


async def test_a_refused_body_is_counted_under_its_route(client: httpx.AsyncClient) -> None:
    await client.post("/segment", content=b"x" * 1_000_001)
    found = read_metrics((await client.get("/metrics")).text)
    assert found['solo_requests_total{method="POST",route="/segment",status="413"}'] == 1
    assert found['solo_rejections_total{reason="body_too_large"}'] == 1


async def test_the_openapi_document_shows_the_contract(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    operation = document["paths"]["/segment"]["post"]
    assert "multipart/form-data" in operation["requestBody"]["content"]
    assert "image/png" in operation["requestBody"]["content"]
    names = {parameter["name"] for parameter in operation["parameters"]}
    assert names == {
        *("model", "version", "score_threshold", "max_instances", "masks"),
        *("overlaps", "object_size_px", "um_per_px", "priority", "timeout_ms", "x-timeout-ms"),
        *("channel", "z", "t", "picture", "scale", "format", "simplify_px"),
    }
    assert "SegmentResponse" in json.dumps(operation["responses"]["200"])
    assert (await client.get("/docs")).status_code == 200


async def test_the_repository_is_loaded_at_the_start_if_none_is_given(
    settings: Settings, open_client: OpenClient
) -> None:
    async with open_client(create_app(settings)) as client:
        assert (await client.post("/segment", content=PICTURE)).status_code == 200


async def test_an_unknown_default_model_stops_the_start(
    settings: Settings, open_client: OpenClient
) -> None:
    wrong = settings.model_copy(update={"default_model": "cats"})
    with pytest.raises(StartupError, match="no default model 'cats'"):
        async with open_client(create_app(wrong)):
            pass


async def test_the_default_model_can_be_set(settings: Settings, open_client: OpenClient) -> None:
    other = settings.model_copy(update={"default_model": "wide"})
    async with open_client(create_app(other)) as client:
        response = await client.post("/segment", content=PICTURE)
        assert response.json()["model"] == "wide"


def subclasses(root: type[ServiceError]) -> set[type[ServiceError]]:
    return {root}.union(*(subclasses(child) for child in root.__subclasses__()))


def test_every_code_that_can_be_sent_has_a_status() -> None:
    sendable = {e for e in subclasses(ServiceError) if not issubclass(e, StartupError)}
    assert {e.code for e in sendable} - {"internal_error"} <= set(STATUS_BY_CODE)
    assert describe_error(StartupError("path of a file"))[1]["code"] == "internal_error"
    assert "path" not in describe_error(StartupError("path of a file"))[1]["message"]


def build_form(*files: bytes) -> bytes:
    head = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
    return b"".join(head + file + b"\r\n" for file in files) + b"--x--\r\n"


FORM = {"content-type": "multipart/form-data; boundary=x"}
BAD = b"\x89PNG\r\n\x1a\n" + bytes(100)


@pytest.mark.parametrize(
    ("path", "headers", "body"),
    [
        ("/segment", {}, b"no image"),
        ("/segment", {}, BAD),
        ("/segment", {}, PICTURE[:-30]),
        ("/segment", {"accept": "application/x-ndjson"}, BAD),
        ("/segment", FORM, build_form(PICTURE, BAD)),
        ("/segment", FORM, build_form(PICTURE)[:-30]),
        (
            "/v2/models/blobs/infer",
            {},
            b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[1],"data":["aGVsbG8="]}]}',
        ),
    ],
)
async def test_a_refused_image_is_freed_with_its_request(
    client: httpx.AsyncClient, path: str, headers: dict[str, str], body: bytes
) -> None:
    await client.post(path, content=body, headers=headers)
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            answer = await client.post(path, content=body, headers=headers)
            assert "error" in answer.text
        await asyncio.sleep(0.05)
        kept = [item for item in gc.get_objects() if isinstance(item, (ImageFile, DecodeError))]
        assert kept == []
    finally:
        gc.enable()
