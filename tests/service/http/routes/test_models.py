from __future__ import annotations

import httpx


async def test_the_list_says_what_is_served_and_why_a_model_is_not(
    client: httpx.AsyncClient,
) -> None:
    blobs, broken, wide = (await client.get("/v2/models")).json()["models"]
    assert (blobs["name"], blobs["state"], blobs["version"]) == ("blobs", "READY", 1)
    assert (blobs["description"], blobs["domain"]) == ("finds red, green and blue regions", "")
    assert (wide["name"], wide["state"]) == ("wide", "READY")
    assert (broken["state"], broken["version"]) == ("UNAVAILABLE", None)
    assert broken["reason"].startswith("broken/1/model.onnx: has 11 bytes, config.json says ")


async def test_a_model_says_what_it_is(client: httpx.AsyncClient) -> None:
    model = (await client.get("/v2/models/blobs")).json()
    assert (model["name"], model["version"], model["versions"]) == ("blobs", 1, ["1"])
    assert (model["backend"], model["device"]) == ("onnxruntime", "cpu")
    assert model["classes"][0] == {"category_id": 10, "name": "red"}
    assert model["input"]["resize"]["rule"] == "tile"
    assert model["provenance"] == {"made_by": "tests"}


async def test_unknown_and_refused_models(client: httpx.AsyncClient) -> None:
    unknown = await client.get("/v2/models/cats")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_model")
    refused = await client.get("/v2/models/broken")
    assert (refused.status_code, refused.json()["code"]) == (503, "model_unavailable")
