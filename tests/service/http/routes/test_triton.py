"""What Triton's clients ask for beyond the Open Inference Protocol."""

from __future__ import annotations

from typing import Any

import pytest
from httpx import AsyncClient

from service.http.routes.triton import NOT_OFFERED
from tests.support.blob_model import draw_picture, encode_picture

FILE = encode_picture(draw_picture(48, 64, {"red": (4, 8, 12, 16)}))


async def get_stats(client: AsyncClient, path: str = "/v2/models/blobs/stats") -> dict[str, Any]:
    response = await client.get(path)
    assert response.status_code == 200
    (stats,) = [entry for entry in response.json()["model_stats"] if entry["name"] == "blobs"]
    assert isinstance(stats, dict)
    return stats


async def test_statistics_are_those_of_the_metrics(client: AsyncClient) -> None:
    before = await get_stats(client)
    assert (before["name"], before["version"]) == ("blobs", "1")
    for body in (FILE, FILE, b"no image"):
        await client.post("/segment", content=body)
    after = await get_stats(client)
    assert after["inference_count"] == before["inference_count"] + 2
    assert after["execution_count"] >= before["execution_count"] + 2
    times, failed = after["inference_stats"], before["inference_stats"]["fail"]["count"]
    assert times["fail"]["count"] == failed + 1
    stages = ("queue", "compute_input", "compute_infer", "compute_output")
    for stage in ("success", *stages):
        assert times[stage]["count"] == after["inference_count"]
    assert sum(times[stage]["ns"] for stage in stages) == pytest.approx(
        times["success"]["ns"], rel=0.01
    )
    text = (await client.get("/metrics")).text
    assert f'solo_images_total{{model="blobs",version="1"}} {after["inference_count"]}.0' in text
    for path in ("/v2/models/stats", "/v2/models/blobs/versions/1/stats"):
        assert await get_stats(client, path) == after


async def test_the_configuration_is_tritons(client: AsyncClient) -> None:
    config = (await client.get("/v2/models/blobs/config")).json()
    assert config["version_policy"] == {"specific": {"versions": [1]}}
    assert config["input"] == [{"name": "image", "data_type": "TYPE_STRING", "dims": [-1]}]
    types = {output["name"]: output["data_type"] for output in config["output"]}
    assert (types["scores"], types["bbox"], types["rle"]) == (
        *("TYPE_FP32", "TYPE_FP32", "TYPE_STRING"),
    )
    assert config["max_batch_size"] == 0
    assert (await client.get("/v2/models/blobs/versions/1/config")).json() == config


@pytest.mark.parametrize("part", ["stats", "config"])
async def test_what_is_not_served_has_neither(client: AsyncClient, part: str) -> None:
    for path in (f"/v2/models/cats/{part}", f"/v2/models/blobs/versions/7/{part}"):
        assert (await client.get(path)).status_code == 404
    wrong = await client.get(f"/v2/models/blobs/versions/x/{part}")
    assert wrong.status_code == 422


@pytest.mark.parametrize("path", NOT_OFFERED)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_what_the_server_lacks_is_refused_with_a_reason(
    client: AsyncClient, path: str, method: str
) -> None:
    sent = path.replace("{name}", "blobs").replace("{rest:path}", "region/a/status")
    response = await client.request(method, sent)
    assert response.status_code == 501
    assert response.json() == {"error": NOT_OFFERED[path], "code": "not_offered"}
