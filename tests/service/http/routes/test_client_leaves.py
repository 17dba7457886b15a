from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import pytest
from fastapi import FastAPI

from service.http.app import create_app
from service.models.repository import load_repository
from service.settings import Settings
from tests.service.conftest import OPTIONS, OpenClient
from tests.support.blob_model import draw_picture, encode_picture

PICTURE = encode_picture(draw_picture(48, 64, {"red": (4, 8, 12, 16), "blue": (30, 30, 10, 10)}))
_TENSOR = {"name": "image", "datatype": "BYTES", "shape": [1]}
_FILES = [base64.b64encode(PICTURE).decode()]
INFERENCE = (
    "/v2/models/blobs/infer",
    json.dumps({"inputs": [{**_TENSOR, "data": _FILES}]}).encode(),
)


@pytest.mark.parametrize(("path", "body"), [("/segment", PICTURE), INFERENCE])
async def test_a_client_that_leaves_has_its_work_removed(
    settings: Settings, open_client: OpenClient, path: str, body: bytes
) -> None:
    patient = settings.model_copy(update={"max_delay_ms": 10_000.0})
    app = create_app(patient, load_repository(patient.model_repo, OPTIONS))
    async with open_client(app) as client:
        segmenter = app.state.segmenter
        statuses = await post_and_leave(app, segmenter.admission, path, body)
        assert statuses in ([], [499])
        assert segmenter.admission.images == 0
        assert segmenter.store.find("blobs", None).scheduler.waiting == 0
        assert (
            'solo_cancelled_images_total{model="blobs",reason="client_left"} 1.0'
            in (await client.get("/metrics")).text
        )


async def post_and_leave(app: FastAPI, admission: Any, path: str, body: bytes) -> list[int]:
    """Posts an image over bare ASGI and disconnects once it is in work."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        while not admission.images:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"image/png")],
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
        "root_path": "",
    }
    await asyncio.wait_for(app(scope, receive, send), 10)
    return statuses
