"""Parameters in the query and in a form, and bodies that are not what they seem."""

from __future__ import annotations

import gzip
import json
import re
from typing import Any

import httpx
import pytest

from tests.support.blob_model import draw_picture, encode_picture

PICTURE = encode_picture(draw_picture(48, 64, {"red": (4, 8, 12, 16), "blue": (30, 30, 10, 10)}))
FILES = [("images", ("a.png", PICTURE))]


def error_of(response: httpx.Response) -> tuple[int, str, str]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["message"]


@pytest.mark.parametrize(
    ("fields", "count", "masks"),
    [
        ({}, 2, True),
        ({"max_instances": "1"}, 1, True),
        ({"score_threshold": "0.96"}, 1, True),
        ({"score_threshold": "1", "timeout_ms": "60000"}, 0, True),
        ({"masks": "none", "priority": "batch"}, 2, False),
    ],
)
async def test_a_field_has_the_effect_of_the_parameter(
    client: httpx.AsyncClient, fields: dict[str, str], count: int, masks: bool
) -> None:
    for response in (
        await client.post("/segment", files=FILES, data=fields),
        await client.post("/segment", files=FILES, params=fields),
    ):
        (result,) = response.raise_for_status().json()["results"]
        assert len(result["instances"]) == count
        assert all(("segmentation" in found) is masks for found in result["instances"])


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"score_threshold": "1.5"}, "1.5"),
        ({"score_threshold": "nan"}, "nan"),
        ({"score_threshold": ""}, "score_threshold"),
        ({"max_instances": "9" * 4000}, "max_instances"),
        ({"masks": "svg"}, "'svg'"),
        ({"score_treshold": "0.5"}, "'score_treshold'"),
        ({"model": "blobs"}, "'model'"),
        ({"version": "1"}, "'version'"),
        ({"priority": ["batch", "batch"]}, "'priority' is given more than once"),
    ],
)
async def test_a_wrong_field_is_named(
    client: httpx.AsyncClient, fields: dict[str, Any], named: str
) -> None:
    status, code, message = error_of(await client.post("/segment", files=FILES, data=fields))
    assert (status, code) == (422, "invalid_parameter")
    assert named in message and len(message) < 500


@pytest.mark.parametrize(
    ("query", "fields", "named"),
    [
        ("masks=none&masks=rle", {}, "'masks' is given more than once"),
        ("masks=rle&masks=rle", {}, "'masks' is given more than once"),
        ("model=blobs&%6dodel=blobs", {}, "'model' is given more than once"),
        ("unknown=1&unknown=2", {}, "'unknown'"),
        ("masks=rle", {"masks": "rle"}, "'masks' is given more than once"),
        ("model=%ff", {}, "query"),
        ("&".join(f"a{i}=1" for i in range(101)), {}, "query"),
        ("&".join(f"a{i}=1" for i in range(50)), {}, "and 40 more"),
        ("version=" + "9" * 5000, {}, "version"),
    ],
)
async def test_a_parameter_is_given_once(
    client: httpx.AsyncClient, query: str, fields: dict[str, str], named: str
) -> None:
    response = await client.post(f"/segment?{query}", files=FILES, data=fields)
    status, code, message = error_of(response)
    assert (status, code) == (422, "invalid_parameter")
    assert named in message and len(message) < 2000


async def test_a_timeout_is_given_once(client: httpx.AsyncClient) -> None:
    headers = [("x-timeout-ms", "60000"), ("X-Timeout-Ms", "5")]
    for path in ("/segment", "/v2/models/blobs/infer"):
        response = await client.post(path, headers=headers, json={})
        assert response.status_code == 422
        assert "'x-timeout-ms' is given more than once" in response.text


async def test_several_wrong_fields_are_all_named(client: httpx.AsyncClient) -> None:
    fields = {"masks": "svg", "score_threshold": "2"}
    _, _, message = error_of(await client.post("/segment", files=FILES, data=fields))
    assert "masks: " in message and "score_threshold: " in message
    assert "form" not in message


async def test_a_part_that_is_cut_is_no_answer(client: httpx.AsyncClient) -> None:
    request = client.build_request("POST", "/segment", files=FILES * 2)
    body = request.read()
    for length in (len(body) - 3, len(body) - 60, len(body) // 2 + 10):
        response = await client.post("/segment", content=body[:length], headers=request.headers)
        assert error_of(response)[:2] == (400, "invalid_multipart")


@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP", "identity, gzip", "deflate"])
@pytest.mark.parametrize("path", ["/segment", "/v2/models/blobs/infer", "/v2/repository/index"])
async def test_a_compressed_body_is_415(
    client: httpx.AsyncClient, path: str, encoding: str
) -> None:
    headers = {"content-encoding": encoding}
    response = await client.post(path, content=gzip.compress(PICTURE), headers=headers)
    assert response.status_code == 415
    assert response.headers["accept-encoding"] == "identity"
    assert "unsupported_encoding" in response.text
    assert encoding.rpartition(" ")[2] in response.text


async def test_a_compressed_form_is_415_and_identity_is_read(client: httpx.AsyncClient) -> None:
    for encoding, status in (("gzip", 415), ("identity", 200), ("", 200)):
        headers = {"content-encoding": encoding}
        response = await client.post("/segment", files=FILES, headers=headers)
        assert response.status_code == status


@pytest.mark.parametrize("kind", ["multipart/mixed; boundary=x", "Multipart/Related"])
async def test_another_kind_of_multipart_is_named(client: httpx.AsyncClient, kind: str) -> None:
    response = await client.post("/segment", content=PICTURE, headers={"content-type": kind})
    assert error_of(response)[:2] == (400, "invalid_multipart")
    assert kind.partition(";")[0].lower() in error_of(response)[2]


async def test_openapi_has_the_fields_of_a_form(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    content = document["paths"]["/segment"]["post"]["requestBody"]["content"]
    properties = content["multipart/form-data"]["schema"]["properties"]
    assert {"images", "masks", "score_threshold", "timeout_ms"} <= set(properties)
    assert "model" not in properties


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        (b"", 200, ""),
        (b" \n", 200, ""),
        (b'{"ready": true}', 200, ""),
        (b"[" * 4000, 422, "recursion"),
        (b'{"ready": 2}', 422, "ready"),
        (b"\xff", 422, "the body"),
        (b" " * 5000, 413, "4096"),
    ],
)
async def test_the_body_of_the_index_is_small(
    client: httpx.AsyncClient, body: bytes, status: int, named: str
) -> None:
    response = await client.post("/v2/repository/index", content=body)
    assert response.status_code == status
    assert re.search(named, response.text)


async def test_every_get_route_answers_head(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    paths = [path for path, methods in document["paths"].items() if "get" in methods]
    assert {"/healthz", "/v2/health/live", "/v2/health/ready", "/metrics"} <= set(paths)
    for path in [*paths, "/", "/docs", "/openapi.json", "/web/app.js"]:
        status = 501 if path.startswith("/v2/jobs") else 200  # this server has no jobs
        path = path.format(name="blobs", version=1, job_id="0")
        assert (await client.get(path)).status_code == status, path
        assert (await client.head(path)).status_code == status, path
    assert (await client.head("/segment")).status_code == 405
    assert (await client.head("/nowhere")).status_code == 404
    assert (await client.delete("/healthz")).headers["allow"] == "GET, HEAD"
    text = (await client.get("/metrics")).text
    assert 'solo_requests_total{method="HEAD",route="/healthz",status="200"} 1.0' in text


@pytest.mark.parametrize(
    "text",
    [
        '{"id": "a", "id": "b", "inputs": []}',
        '{"inputs": [{"name": "image", "name": "image"}]}',
        '{"inputs": [{"data": ["AA=="], "data": ["AA=="]}]}',
        '{"parameters": {"priority": 1, "priorit\\u0079": 2}}',
    ],
)
async def test_a_repeated_field_of_json_is_named(client: httpx.AsyncClient, text: str) -> None:
    response = await client.post("/v2/models/blobs/infer", content=text.encode())
    assert response.status_code == 422
    assert "is given more than once" in json.loads(response.content)["error"]
