"""`warnings` of results, over HTTP."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from pipeline.domain import NOT_JUDGED, UNUSUAL, describe_image
from pipeline.model_config import STATISTICS
from pipeline.types import UInt8
from service.http.app import create_app
from service.models.repository import load_repository
from service.settings import Settings
from tests.service.conftest import OPTIONS, OpenClient
from tests.support.blob_model import draw_picture, encode_picture, publish

USUAL = draw_picture(64, 64)
STRIPES = np.repeat(np.tile(np.array([0, 255], np.uint8), (64, 32))[..., None], 3, axis=2)
FAINT = USUAL // 2
"""Too dark for anything to be found."""
BLANK = np.zeros((64, 64, 3), np.uint8)


def add_domain(folder: Path, image: UInt8 = USUAL, confidence: float = 0.0) -> None:
    """A domain around an image."""
    appearance = describe_image(image)
    assert appearance is not None
    content = json.loads((folder / "config.json").read_text())
    content["versions"]["1"]["domain"] = {
        "statistics": STATISTICS,
        "spreads": [0.1] * len(STATISTICS),
        "centres": [[*appearance.tolist(), confidence]],
        "threshold": 1.0,
    }
    (folder / "config.json").write_text(json.dumps(content))


@pytest.fixture
async def blobs(
    settings: Settings, open_client: OpenClient, tmp_path: Path
) -> AsyncIterator[httpx.AsyncClient]:
    root = tmp_path / "warned"
    add_domain(publish(root, "blobs"))
    publish(root, "plain")
    add_domain(publish(root, "sure"), FAINT, 0.5)
    given = settings.model_copy(update={"model_repo": root, "default_model": "blobs"})
    async with open_client(create_app(given, load_repository(root, OPTIONS))) as client:
        yield client


async def test_each_image_has_its_own_warnings(blobs: httpx.AsyncClient) -> None:
    parts = [("images", encode_picture(image)) for image in (USUAL, STRIPES, BLANK)]
    answer = await blobs.post("/segment", files=[*parts, ("images", b"no image")])
    first, second, third, fourth = answer.json()["results"]
    assert first["warnings"] == [] and "warnings" not in fourth
    assert [w["code"] for w in second["warnings"]] == [UNUSUAL]
    assert [w["code"] for w in third["warnings"]] == [NOT_JUDGED]
    assert "'blobs'" in second["warnings"][0]["message"]
    (nothing,) = (await blobs.post("/segment?model=sure", content=encode_picture(FAINT))).json()[
        "results"
    ]
    assert not nothing["instances"] and [w["code"] for w in nothing["warnings"]] == [UNUSUAL]
    plain = await blobs.post("/segment?model=plain", content=encode_picture(STRIPES))
    assert plain.json()["results"][0]["warnings"] == []


async def test_answers_that_are_no_json_have_the_codes_in_a_header(
    blobs: httpx.AsyncClient,
) -> None:
    for image, expected in ((USUAL, None), (STRIPES, UNUSUAL)):
        content = encode_picture(image)
        picture = await blobs.post("/segment", content=content, headers={"accept": "image/png"})
        assert picture.headers["content-type"] == "image/png"
        assert picture.headers.get("x-solo-warnings") == expected
    parts = [("images", encode_picture(image)) for image in (USUAL, BLANK, STRIPES, STRIPES)]
    table = await blobs.post("/segment?format=csv", files=parts)
    assert table.headers["x-solo-warnings"] == f"{NOT_JUDGED}, {UNUSUAL}"
    lines = await blobs.post(
        "/segment?format=csv", files=parts, headers={"accept": "application/x-ndjson"}
    )
    result = json.loads(lines.text.splitlines()[-1])["result"]
    assert result["warnings"] == [[], [NOT_JUDGED], [UNUSUAL], [UNUSUAL]]


async def test_infer_has_an_output_of_them(blobs: httpx.AsyncClient) -> None:
    data = [base64.b64encode(encode_picture(image)).decode() for image in (USUAL, STRIPES)]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [2], "data": data}
    body = {"inputs": [tensor], "outputs": [{"name": "warnings"}]}
    answer = (await blobs.post("/v2/models/blobs/infer", json=body)).json()
    (output,) = answer["outputs"]
    assert output["data"][0] == "" and output["data"][1].startswith(f"{UNUSUAL}: the image")
