"""How much one request of POST /segment may ask for, and what a full server answers."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import FastAPI

from service.http.app import create_app
from service.http.schemas import SegmentResponse
from service.models.repository import load_repository
from service.settings import Settings
from service.work.image import ImageWork
from tests.service.conftest import OPTIONS, OpenClient
from tests.service.http.routes.test_segment import PICTURE, error_of, part
from tests.support.blob_model import draw_picture, encode_picture
from tests.support.pictures import build_png_header


@pytest.mark.parametrize(("queue", "most"), [(4096, 256), (24, 24)])
async def test_as_many_images_as_the_queue_holds_and_at_most_256(
    settings: Settings, open_client: OpenClient, queue: int, most: int
) -> None:
    update = {"max_queue_canvases": queue, "max_image_canvases": 12}
    small = settings.model_copy(update=update)
    app = create_app(small, load_repository(small.model_repo, OPTIONS))
    async with open_client(app) as client:
        for count, status in ((most, 200), (most + 1, 413)):
            response = await client.post("/segment", files=[("images", b"text")] * count)
            assert response.status_code == status
        error = response.json()["error"]
        assert error["code"] == "too_many_images" and f"may have {most} images" in error["message"]


async def test_overload_is_503_with_retry_after(
    settings: Settings, open_client: OpenClient
) -> None:
    small = settings.model_copy(update={"max_queue_canvases": 4, "max_delay_ms": 200.0})
    app = create_app(small, load_repository(small.model_repo, OPTIONS))
    async with open_client(app) as client:
        responses = await asyncio.gather(
            *(client.post("/segment", files=[part(PICTURE)]) for _ in range(12))
        )
        statuses = [response.status_code for response in responses]
        assert statuses.count(200) >= 2
        rejected = [response for response in responses if response.status_code == 503]
        assert len(rejected) == 12 - statuses.count(200) > 0
        assert {response.headers["retry-after"] for response in rejected} == {"1"}
        assert {error_of(response)["code"] for response in rejected} == {"overloaded"}
        assert (await client.post("/segment", files=[part(PICTURE)])).status_code == 200
        metrics = (await client.get("/metrics")).text
        assert f'solo_rejections_total{{reason="client_share"}} {len(rejected)}.0' in metrics
        assert "solo_queue_images 0.0" in metrics
        assert "solo_queue_canvases 0.0" in metrics


async def test_more_than_can_ever_fit_is_413(settings: Settings, open_client: OpenClient) -> None:
    small = settings.model_copy(update={"max_queue_canvases": 24, "max_image_canvases": 12})
    app = create_app(small, load_repository(small.model_repo, OPTIONS))
    nine = encode_picture(draw_picture(128, 128))
    async with open_client(app) as client:
        for files in ([part(PICTURE)] * 13, [part(nine), part(nine)]):
            response = await client.post("/segment", files=files)
            assert (response.status_code, error_of(response)["code"]) == (413, "too_many_images")
        assert "18 canvases together, at most 12" in error_of(response)["message"]
        assert (await client.post("/segment", files=[part(nine)])).status_code == 200


async def test_a_thin_image_is_413_with_its_canvases_and_is_not_decoded(
    client: httpx.AsyncClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40,000,000 pixels, as allowed, but 833,333 tiles of 64 px."""

    def decode(self: ImageWork) -> None:
        pytest.fail("decoded")

    monkeypatch.setattr(ImageWork, "open", decode)
    for width, height in ((40_000_000, 1), (1, 40_000_000)):
        response = await client.post("/segment", content=build_png_header(width, height))
        assert (response.status_code, error_of(response)["code"]) == (413, "too_many_canvases")
        message = error_of(response)["message"]
        assert message.startswith(f"the image of {width}x{height} px needs 833333 canvases")
        assert "the server allows 4096" in message
    assert app.state.segmenter.admission.canvases == 0
    text = (await client.get("/metrics")).text
    assert 'solo_image_errors_total{code="too_many_canvases",model="blobs",version="1"} 2.0' in text


async def test_an_image_of_too_many_canvases_fails_alone(
    settings: Settings, open_client: OpenClient
) -> None:
    small = settings.model_copy(update={"max_image_canvases": 8})
    app = create_app(small, load_repository(small.model_repo, OPTIONS))
    files = [part(PICTURE), part(encode_picture(draw_picture(128, 128)), "large.png")]
    async with open_client(app) as client:
        body = (await client.post("/segment", files=files)).raise_for_status().json()
        first, second = body["results"]
        assert len(first["instances"]) == 2
        assert second["error"]["code"] == "too_many_canvases"
        assert "needs 9 canvases, the server allows 8" in second["error"]["message"]
        assert body["canvases"] == body["cost"]["canvases"] == 1
        SegmentResponse.model_validate(body)
