"""Deadlines and priorities of POST /segment."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import httpx
import pytest

from service.http.app import create_app
from service.models.repository import load_repository
from service.settings import Settings
from tests.service.conftest import OPTIONS, OpenClient
from tests.support.blob_model import draw_picture, encode_picture

PICTURE = encode_picture(draw_picture(48, 64, {"red": (4, 8, 12, 16), "blue": (30, 30, 10, 10)}))


def part(data: bytes) -> tuple[str, tuple[str, bytes]]:
    return "images", ("a.png", data)


@pytest.mark.parametrize("header", [False, True])
async def test_a_deadline_that_passes_is_504_and_removes_the_work(
    settings: Settings, open_client: OpenClient, header: bool
) -> None:
    patient = settings.model_copy(update={"max_delay_ms": 10_000.0})
    app = create_app(patient, load_repository(patient.model_repo, OPTIONS))
    given: dict[str, Any] = {"headers": {"X-Timeout-Ms": "60"}} if header else {}
    async with open_client(app) as client:
        began_s = time.monotonic()
        response = await client.post(
            "/segment",
            files=[part(PICTURE)] * 3,
            params={} if header else {"timeout_ms": 60},
            **given,
        )
        assert time.monotonic() - began_s >= 0.06
        assert (response.status_code, response.json()["error"]["code"]) == (
            504,
            "deadline_exceeded",
        )
        assert "within 60 ms" in response.text
        assert app.state.segmenter.admission.images == 0
        assert app.state.segmenter.store.find("blobs", None).scheduler.waiting == 0
        cancelled = 'solo_cancelled_images_total{model="blobs",reason="deadline"} 3.0'
        assert cancelled in (await client.get("/metrics")).text


async def test_the_servers_deadline_holds_for_requests_that_give_none(
    settings: Settings, open_client: OpenClient
) -> None:
    update = {"max_delay_ms": 10_000.0, "request_timeout_ms": 50}
    app = create_app(
        settings.model_copy(update=update), load_repository(settings.model_repo, OPTIONS)
    )
    async with open_client(app) as client:
        assert (await client.post("/segment", files=[part(PICTURE)])).status_code == 504


async def test_a_deadline_that_is_kept_changes_nothing(client: httpx.AsyncClient) -> None:
    response = await client.post("/segment?timeout_ms=60000", files=[part(PICTURE)])
    assert response.status_code == 200
    assert len(response.json()["results"][0]["instances"]) == 2


@pytest.mark.parametrize("value", ["0", "-5", "soon", "99999999999"])
async def test_a_wrong_deadline_is_named(client: httpx.AsyncClient, value: str) -> None:
    for given in ({"params": {"timeout_ms": value}}, {"headers": {"X-Timeout-Ms": value}}):
        response = await client.post("/segment", files=[part(PICTURE)], **given)  # type: ignore[arg-type]
        assert response.status_code == 422
        assert f"not '{value}'" in response.json()["error"]["message"]


@pytest.mark.parametrize("max_delay_ms", [None, 0.001], ids=["canvas by canvas", "batches"])
async def test_interactive_work_goes_before_batch_work(
    settings: Settings,
    open_client: OpenClient,
    monkeypatch: pytest.MonkeyPatch,
    max_delay_ms: float | None,
) -> None:
    update = {"max_batch": 1, "pool_threads": 1, "max_delay_ms": max_delay_ms}
    alone = settings.model_copy(update=update)
    repository = load_repository(alone.model_repo, OPTIONS)
    app = create_app(alone, repository)
    backend, go, done = repository.models["blobs"][1].backend, threading.Event(), list[str]()
    infer = backend.infer

    def infer_when_told(tiles: Any) -> Any:
        assert go.wait(10)
        return infer(tiles)

    monkeypatch.setattr(backend, "infer", infer_when_told)

    async def post(priority: str) -> None:
        params = {"priority": priority}
        assert (await client.post("/segment", files=[part(PICTURE)], params=params)).is_success
        done.append(priority)

    async with open_client(app) as client:
        admission = app.state.segmenter.admission
        tasks = [asyncio.create_task(post("batch")) for _ in range(24)]
        async with asyncio.timeout(10):
            while admission.images < 24:
                await asyncio.sleep(0.001)
        tasks.append(asyncio.create_task(post("interactive")))
        async with asyncio.timeout(10):
            while admission.images < 25:
                await asyncio.sleep(0.001)
        go.set()
        await asyncio.gather(*tasks)
        # Ahead of it: what the engine, the decoding thread and its queue already had.
        assert done.index("interactive") < 8
        refused = await client.post("/segment?priority=urgent", files=[part(PICTURE)])
        assert refused.status_code == 422
