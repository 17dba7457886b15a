"""`scale=auto`, over HTTP and in process."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from pipeline.auto_scale import UNCERTAIN, count_probes
from pipeline.types import UInt8
from service.http.app import create_app
from service.models.repository import load_repository, load_version, read_config
from service.settings import Settings
from service.work.request import RequestOptions
from tests.service.conftest import OPTIONS, OpenClient
from tests.support.blob_model import draw_picture, encode_picture, publish

OWN_PX = 16


def boxes(side: int) -> UInt8:
    """Three boxes of different colours, which the smallest scale shows in one tile."""
    near, far = 4, 8 + side
    return draw_picture(
        far + side + 4,
        far + side + 4,
        {
            "red": (near, near, side, side),
            "green": (far, near, side, side),
            "blue": (near, far, side, side),
        },
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "auto"
    publish(root, "blobs", card={"object_size_px": OWN_PX})
    return root


@pytest.fixture
async def blobs(
    settings: Settings, open_client: OpenClient, root: Path
) -> AsyncIterator[httpx.AsyncClient]:
    given = settings.model_copy(update={"model_repo": root, "max_image_canvases": 1000})
    async with open_client(create_app(given, load_repository(root, OPTIONS))) as client:
        yield client


async def _ask(client: httpx.AsyncClient, picture: UInt8, query: str = "scale=auto") -> Any:
    answer = await client.post(f"/segment?{query}", content=encode_picture(picture))
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_large_objects_are_shown_smaller_and_the_first_pass_is_paid(
    blobs: httpx.AsyncClient, root: Path
) -> None:
    picture = boxes(48)
    answer = await _ask(blobs, picture)
    (result,) = answer["results"]
    assert 0.2 < result["scale"] < 0.4 and result["warnings"] == []
    probes = count_probes(picture.shape[:2], read_config(root / "blobs").input)
    assert answer["canvases"] == answer["cost"]["canvases"] == result["canvases"] + probes
    asked = await _ask(blobs, picture, f"object_size_px={OWN_PX / result['scale']}")
    assert asked["results"][0]["instances"] == result["instances"]


async def test_an_image_too_large_at_the_models_scale_may_be_small_enough(
    settings: Settings, open_client: OpenClient, root: Path
) -> None:
    given = settings.model_copy(update={"model_repo": root, "max_image_canvases": 3})
    async with open_client(create_app(given, load_repository(root, OPTIONS))) as client:
        content = encode_picture(boxes(48))
        assert (await client.post("/segment", content=content)).status_code == 413
        (result,) = (await _ask(client, boxes(48)))["results"]
        assert result["canvases"] == 1 and len(result["instances"]) == 3
        own_size = await client.post("/segment?scale=auto", content=encode_picture(boxes(30)))
        assert (own_size.status_code, own_size.json()["error"]["code"]) == (
            413,
            "too_many_canvases",
        )


async def test_objects_of_the_models_size_are_shown_as_they_are(blobs: httpx.AsyncClient) -> None:
    auto, own = await _ask(blobs, boxes(16)), await _ask(blobs, boxes(16), "")
    assert auto["results"] == own["results"] and own["results"][0]["scale"] == 1
    assert auto["cost"]["canvases"] > own["cost"]["canvases"]


async def test_an_image_without_objects_is_answered_with_a_warning(
    blobs: httpx.AsyncClient,
) -> None:
    (result,) = (await _ask(blobs, np.zeros((100, 100, 3), np.uint8)))["results"]
    assert (result["scale"], result["instances"]) == (1, [])
    assert [w["code"] for w in result["warnings"]] == [UNCERTAIN]


async def test_each_image_has_its_own_scale_and_a_bad_one_fails_alone(
    blobs: httpx.AsyncClient,
) -> None:
    cut = encode_picture(boxes(48))[:-200]
    files = [encode_picture(boxes(48)), b"no image", cut, encode_picture(boxes(16))]
    answer = await blobs.post("/segment?scale=auto", files=[("images", file) for file in files])
    first, second, third, fourth = answer.json()["results"]
    assert first["scale"] < 0.4 and fourth["scale"] == 1
    assert second["error"]["code"] == "unsupported_format"
    assert third["error"]["code"] == "corrupt_image"


async def test_progress_counts_both_passes(blobs: httpx.AsyncClient) -> None:
    headers = {"accept": "application/x-ndjson"}
    answer = await blobs.post(
        "/segment?scale=auto", content=encode_picture(boxes(48)), headers=headers
    )
    lines = [json.loads(line) for line in answer.text.splitlines()]
    result = lines[-1]["result"]
    progress = [line["progress"] for line in lines[:-1]]
    assert all(p["canvases_done"] <= p["canvases"] <= result["canvases"] for p in progress)


async def test_infer_and_a_model_in_this_process_find_the_same(
    blobs: httpx.AsyncClient, root: Path
) -> None:
    picture = boxes(48)
    (result,) = (await _ask(blobs, picture))["results"]
    data = [base64.b64encode(encode_picture(picture)).decode()]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": data}
    body = {"inputs": [tensor], "parameters": {"scale": "auto"}}
    answer = (await blobs.post("/v2/models/blobs/infer", json=body)).json()
    outputs = {output["name"]: output["data"] for output in answer["outputs"]}
    counts = [instance["segmentation"]["counts"] for instance in result["instances"]]
    assert outputs["rle"] == counts
    model = load_version(root / "blobs", None, OPTIONS)
    local = model.answer(picture, RequestOptions(scale="auto"))
    assert [i.rle["counts"].decode() for i in local.instances] == counts
    assert round(local.scale, 4) == result["scale"]
