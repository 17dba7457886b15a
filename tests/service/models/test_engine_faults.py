"""What clients see when an engine dies, hangs, or fails on one image."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from pipeline.postprocess import TileCandidates
from pipeline.types import Tile
from service.engines.base import BackendError
from service.engines.slots import SlotBackend
from service.http.app import create_app
from service.models.repository import Repository, load_repository
from service.settings import Settings
from tests.service.conftest import OPTIONS, OpenClient
from tests.support.blob_model import draw_picture, encode_picture

PICTURE = encode_picture(draw_picture())


class Fault:
    """Breaks the first engine of the process, and holds the building of the next."""

    def __init__(self) -> None:
        self.broken: SlotBackend | None = None
        self.hangs = False
        self.may_build = threading.Event()
        self.may_return = threading.Event()
        self.may_fail = threading.Event()
        self.may_fail.set()


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Fault:
    fault = Fault()
    infer, rebuild = SlotBackend.infer, Repository.rebuild

    def infer_or_fail(self: SlotBackend, tiles: Sequence[Tile]) -> Sequence[TileCandidates]:
        if self is fault.broken:
            if fault.hangs:
                fault.may_return.wait(20)
            assert fault.may_fail.wait(20)
            raise MemoryError("bad allocation")
        return infer(self, tiles)

    def rebuild_when_told(self: Repository, model: Any) -> Any:
        assert fault.may_build.wait(20)
        return rebuild(self, model)

    monkeypatch.setattr(SlotBackend, "infer", infer_or_fail)
    monkeypatch.setattr(Repository, "rebuild", rebuild_when_told)
    return fault


@pytest.fixture(params=[None, 1.0], ids=["lanes", "batches"])
async def watched(settings: Settings, fault: Fault, request: pytest.FixtureRequest) -> FastAPI:
    update = {"engine_timeout_s": 0.3, "max_delay_ms": request.param}
    quick = settings.model_copy(update=update)
    repository = load_repository(quick.model_repo, OPTIONS)
    backend = repository.models["blobs"][1].backend
    assert isinstance(backend, SlotBackend)
    fault.broken = backend
    return create_app(quick, repository)


@pytest.fixture
async def client(
    watched: FastAPI, fault: Fault, open_client: OpenClient
) -> AsyncIterator[httpx.AsyncClient]:
    async with open_client(watched) as opened:
        try:
            yield opened
        finally:
            fault.may_build.set()
            fault.may_return.set()


async def post(client: httpx.AsyncClient, model: str = "blobs") -> httpx.Response:
    return await client.post("/segment", params={"model": model}, content=PICTURE)


async def wait_until_not_ready(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(10):
        while (await client.get("/v2/health/ready")).status_code == 200:
            await asyncio.sleep(0.005)


async def test_a_dead_engine_is_replaced_and_nothing_accepted_is_lost(
    client: httpx.AsyncClient, watched: FastAPI, fault: Fault
) -> None:
    fault.may_fail.clear()
    accepted = [asyncio.create_task(post(client)) for _ in range(5)]
    async with asyncio.timeout(10):
        while watched.state.segmenter.admission.images < 5:
            await asyncio.sleep(0.001)
    fault.may_fail.set()
    await wait_until_not_ready(client)
    assert (await client.get("/healthz")).json() == {"status": "engine_restarting"}
    refused = await post(client)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert refused.json()["error"]["code"] == "engine_restarting"
    metrics = (await client.get("/metrics")).text
    assert 'solo_engine_up{model="blobs"} 0.0' in metrics and "solo_ready 0.0" in metrics
    assert (await post(client, "wide")).status_code == 200  # another model goes on

    fault.may_build.set()
    assert [r.status_code for r in await asyncio.gather(*accepted)] == [200] * 5
    assert (await client.get("/v2/health/ready")).status_code == 200
    metrics = (await client.get("/metrics")).text
    assert 'solo_engine_restarts_total{model="blobs"} 1.0' in metrics
    assert 'solo_engine_up{model="blobs"} 1.0' in metrics


async def test_an_engine_that_hangs_costs_the_image_it_hangs_on_and_no_other(
    client: httpx.AsyncClient, fault: Fault
) -> None:
    fault.hangs = True
    fault.may_build.set()
    hung = await post(client)
    assert (hung.status_code, hung.json()["error"]["code"]) == (500, "engine_error")
    async with asyncio.timeout(10):
        while (await post(client)).status_code != 200:
            await asyncio.sleep(0.01)
    assert 'solo_engine_restarts_total{model="blobs"} 1.0' in (await client.get("/metrics")).text


async def test_work_that_waits_for_a_new_engine_keeps_its_deadline(
    client: httpx.AsyncClient, fault: Fault
) -> None:
    late = await client.post("/segment?timeout_ms=80", content=PICTURE)
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert "solo_queue_images 0.0" in (await client.get("/metrics")).text


async def test_the_server_ends_while_an_engine_is_missing(
    watched: FastAPI, open_client: OpenClient
) -> None:
    async with open_client(watched) as client:
        task = asyncio.create_task(post(client))
        await wait_until_not_ready(client)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(BackendError, match="closed"):
        watched.state.segmenter.store.all_models[0].engine.infer([], lambda: None)
