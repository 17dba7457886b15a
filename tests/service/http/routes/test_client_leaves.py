from __future__ import annotations

import base64
import json

import httpx
import pytest

from service.http.app import create_app
from service.models.repository import load_repository
from service.settings import Settings
from tests.service.conftest import OPTIONS
from tests.support.asgi import AsgiExchange
from tests.support.blob_model import draw_picture, encode_picture
from tests.support.gate import EngineGate
from tests.support.waiting import wait_until

PICTURE = encode_picture(draw_picture(48, 64, {"red": (4, 8, 12, 16), "blue": (30, 30, 10, 10)}))
_TENSOR = {"name": "image", "datatype": "BYTES", "shape": [1]}
_FILES = [base64.b64encode(PICTURE).decode()]
INFERENCE = (
    "/v2/models/blobs/infer",
    json.dumps({"inputs": [{**_TENSOR, "data": _FILES}]}).encode(),
)


@pytest.mark.parametrize(("path", "body"), [("/segment", PICTURE), INFERENCE])
@pytest.mark.parametrize("max_delay_ms", [None, 10_000.0], ids=["canvas by canvas", "batches"])
async def test_a_client_that_leaves_has_its_work_removed(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: bytes,
    max_delay_ms: float | None,
) -> None:
    patient = settings.model_copy(update={"max_delay_ms": max_delay_ms})
    repository = load_repository(patient.model_repo, OPTIONS)
    gate = EngineGate(monkeypatch, repository)
    app = create_app(patient, repository)
    async with app.router.lifespan_context(app):
        segmenter = app.state.segmenter
        exchange = AsgiExchange(app, path, body)
        await wait_until(lambda: segmenter.admission.images == 1)
        exchange.leave()
        statuses = [m["status"] for m in await exchange.end() if "status" in m]
        assert statuses == [499]
        assert (segmenter.admission.images, segmenter.admission.canvases) == (0, 0)
        assert segmenter.admission.requests == 0
        model = segmenter.store.find("blobs", None)
        assert (model.scheduler.waiting, model.users) == (0, 0)
        text = (await segmenter.metrics.answer(""))[0].decode()
        assert 'solo_cancelled_images_total{model="blobs",reason="client_left"} 1.0' in text
        assert 'status="499"} 1.0' in text
        gate.let()


async def test_the_canvases_of_a_client_that_left_are_not_processed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine has at that moment is finished: one canvas of 25."""
    repository = load_repository(settings.model_repo, OPTIONS)
    gate = EngineGate(monkeypatch, repository)
    app = create_app(settings, repository)
    async with app.router.lifespan_context(app):
        admission = app.state.segmenter.admission
        exchange = AsgiExchange(app, "/segment", encode_picture(draw_picture(256, 256)))
        await wait_until(lambda: admission.canvases == 25)
        exchange.leave()
        await exchange.end()
        gate.let()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            assert (await client.post("/segment", content=PICTURE)).status_code == 200
        assert gate.calls <= 2
