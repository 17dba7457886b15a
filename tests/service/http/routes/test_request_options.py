"""overlaps, object_size_px and um_per_px, over HTTP."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from service.http.app import create_app
from service.models.repository import load_repository
from service.settings import Settings
from tests.service.conftest import OPTIONS, OpenClient
from tests.support.blob_model import KEEP_RATIO_INPUT, draw_picture, encode_picture, publish

CARD = {"object_size_px": 16, "domain": "coloured boxes"}
CROSSING = draw_picture(96, 96, {"red": (20, 20, 40, 40), "green": (20, 52, 40, 24)})


@pytest.fixture
async def blobs(
    settings: Settings, open_client: OpenClient, tmp_path: Path
) -> AsyncIterator[httpx.AsyncClient]:
    root = tmp_path / "sized"
    publish(root, "blobs", card=CARD)
    publish(root, "whole", input=KEEP_RATIO_INPUT, card=CARD)
    publish(root, "lines", task="contour", card=CARD)
    publish(root, "plain")
    given = settings.model_copy(
        update={"model_repo": root, "default_model": "blobs", "max_image_canvases": 16}
    )
    async with open_client(create_app(given, load_repository(root, OPTIONS))) as client:
        yield client


async def _segment(client: httpx.AsyncClient, picture: Any, query: str = "") -> dict[str, Any]:
    answer = await client.post(f"/segment?{query}", content=encode_picture(picture))
    assert answer.status_code == 200, answer.text
    (result,) = answer.json()["results"]
    return dict(result)


def _decode(instance: dict[str, Any]) -> np.ndarray:
    rle = instance["segmentation"]
    return np.asarray(coco_mask.decode([{**rle, "counts": rle["counts"].encode()}])[..., 0])


async def test_resolved_masks_share_no_pixel(blobs: httpx.AsyncClient) -> None:
    kept = await _segment(blobs, CROSSING)
    resolved = await _segment(blobs, CROSSING, "overlaps=resolve")
    assert np.sum([_decode(i) for i in kept["instances"]], axis=0).max() == 2
    masks = [_decode(i) for i in resolved["instances"]]
    assert [i["category"] for i in resolved["instances"]] == [
        i["category"] for i in kept["instances"]
    ]
    np.testing.assert_array_equal(np.sum(masks, axis=0), CROSSING.max(axis=2) > 0)
    assert resolved["instances"][0] == kept["instances"][0]
    assert await _segment(blobs, CROSSING, "overlaps=keep") == kept


async def test_what_resolving_drops_is_not_counted(blobs: httpx.AsyncClient) -> None:
    nested = draw_picture(48, 48, {"red": (4, 4, 40, 40), "green": (8, 8, 30, 30)})
    assert (await _segment(blobs, nested))["instances_found"] == 2
    resolved = await _segment(blobs, nested, "overlaps=resolve")
    assert (resolved["instances_found"], resolved["truncated"]) == (1, False)


async def test_masks_of_a_scaled_image_are_those_of_its_pixels(blobs: httpx.AsyncClient) -> None:
    picture = draw_picture(200, 120, {"red": (24, 64, 48, 96)})
    for size, canvases, scale in ((32, 2, 0.5), (16, 12, 1.0), (64, 1, 0.25)):
        result = await _segment(blobs, picture, f"object_size_px={size}")
        assert (result["scale"], result["canvases"]) == (scale, canvases)
        assert (result["width"], result["height"]) == (120, 200)
        (instance,) = result["instances"]
        difference = _decode(instance) != (picture[..., 0] > 0)
        assert difference.sum() < 0.03 * 48 * 96
    assert (await _segment(blobs, picture))["scale"] == 1


async def test_admission_counts_the_scaled_canvases(blobs: httpx.AsyncClient) -> None:
    body = encode_picture(draw_picture(200, 120))
    answer = await blobs.post("/segment?object_size_px=8", content=body)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "too_many_canvases"
    assert "needs 40 canvases, the server allows 16" in answer.json()["error"]["message"]
    assert "a larger object_size_px" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("object_size_px=3", "object_size_px 3 is not in 4 to 64"),
        ("object_size_px=0", "greater than 0"),
        ("object_size_px=nan", "not 'nan'"),
        ("object_size_px=inf", "less than or equal"),
        ("um_per_px=0.5", "um_per_px: the card of model 'blobs' states no"),
        ("um_per_px=1&object_size_px=16", "give one"),
        ("model=whole&object_size_px=16", "model 'whole' has no fixed scale"),
        ("model=whole&scale=auto", "scale: model 'whole' has no fixed scale"),
        ("scale=auto&object_size_px=16", "object_size_px and scale cannot be combined"),
        ("model=plain&scale=auto", "the card of model 'plain' states no object_size_px"),
        ("scale=2", "'own' or 'auto'"),
        ("model=lines&overlaps=resolve", "model 'lines' finds contours"),
        ("overlaps=drop", "'keep' or 'resolve'"),
    ],
)
async def test_what_is_impossible_is_422(blobs: httpx.AsyncClient, query: str, reason: str) -> None:
    answer = await blobs.post(f"/segment?{query}", content=encode_picture(CROSSING))
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_parameter")
    assert reason in answer.json()["error"]["message"]


async def test_they_are_fields_of_a_form_too(blobs: httpx.AsyncClient) -> None:
    parts = [("images", encode_picture(CROSSING)), ("images", encode_picture(CROSSING))]
    data = {"overlaps": "resolve", "object_size_px": "32"}
    answer = (await blobs.post("/segment", files=parts, data=data)).json()
    alone = await _segment(blobs, CROSSING, "overlaps=resolve&object_size_px=32")
    for result in answer["results"]:
        assert {**result, "file_name": None} == alone


async def test_they_are_parameters_of_infer_too(blobs: httpx.AsyncClient) -> None:
    data = [base64.b64encode(encode_picture(CROSSING)).decode()]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": data}
    parameters = {"overlaps": "resolve", "object_size_px": 32}
    answer = await blobs.post(
        "/v2/models/blobs/infer", json={"inputs": [tensor], "parameters": parameters}
    )
    outputs = {o["name"]: o["data"] for o in answer.json()["outputs"]}
    alone = await _segment(blobs, CROSSING, "overlaps=resolve&object_size_px=32")
    assert outputs["rle"] == [i["segmentation"]["counts"] for i in alone["instances"]]
    wrong = {"inputs": [tensor], "parameters": {"um_per_px": 1.0}}
    assert (await blobs.post("/v2/models/blobs/infer", json=wrong)).status_code == 422


async def test_the_card_is_in_the_metadata(blobs: httpx.AsyncClient) -> None:
    card = (await blobs.get("/v2/models/blobs")).json()["card"]
    assert (card["object_size_px"], card["domain"], card["um_per_px"]) == (16, CARD["domain"], None)
