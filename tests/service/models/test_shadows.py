"""A version that is compared with the served one: promoted, rejected, and never in the way."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from pipeline.types import UInt8
from service.http.app import create_app
from service.models import shadow as shadow_module
from service.models import shadows as shadows_module
from service.models.repository import LoadedModel, load_repository, load_version
from service.settings import Settings
from service.work.request import ClientProfile, ImageFile
from tests.service.conftest import OPTIONS, OpenClient
from tests.support.blob_model import draw_picture, encode_picture
from tests.support.model_folder import add_version, edit_config
from tests.support.waiting import wait_until

OTHER = ClientProfile(name="other")
PICTURE = encode_picture(draw_picture())
RULE = {"share": 1.0, "images": 3, "max_failures": 0, "max_slowdown": 1000.0}


@pytest.fixture
def folder(model_repo: Path, request: pytest.FixtureRequest) -> Path:
    """The model `blobs`, whose version 2 is the shadow of version 1; parameters change the rule."""
    return publish_shadow(model_repo / "blobs", **getattr(request, "param", {}))


def publish_shadow(folder: Path, **rule: Any) -> Path:
    add_version(folder, 2)
    serve(folder, {"policy": "shadow", "live": 1, "shadow": 2, **RULE, **rule})
    return folder


def serve(folder: Path, policy: dict[str, Any]) -> None:
    edit_config(folder, lambda content: content.update(serve=policy))


class ShadowEngine:
    """Changes the engine of the shadow: what `infer` does with what it has found."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.change: Any = lambda found: found
        self.closed = threading.Event()
        load = load_version

        def load_changed(*arguments: Any) -> LoadedModel:
            loaded = load(*arguments)
            infer, close = loaded.backend.infer, loaded.backend.close

            def changed(tiles: Any) -> Any:
                self.calls += 1
                return self.change(infer(tiles))

            def close_noted() -> None:
                self.closed.set()
                close()

            monkeypatch.setattr(loaded.backend, "infer", changed)
            monkeypatch.setattr(loaded.backend, "close", close_noted)
            return loaded

        monkeypatch.setattr(shadows_module, "load_version", load_changed)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ShadowEngine:
    return ShadowEngine(monkeypatch)


@pytest.fixture
async def app(settings: Settings, folder: Path, engine: ShadowEngine) -> FastAPI:
    changed = settings.model_copy(update={"engine_timeout_s": 2.0})
    return create_app(changed, load_repository(settings.model_repo, OPTIONS))


@pytest.fixture
async def client(app: FastAPI, open_client: OpenClient) -> AsyncIterator[httpx.AsyncClient]:
    async with open_client(app) as opened:
        for _ in range(1000):
            if (await get_shadow(opened))["status"] in ("running", "failed"):
                break
            await asyncio.sleep(0.01)
        yield opened


async def get_shadow(client: httpx.AsyncClient) -> dict[str, Any]:
    detail = (await client.get("/v2/models/blobs")).json()
    return detail["shadow"] or {"status": None}


async def get_version(client: httpx.AsyncClient) -> int:
    return int((await client.get("/v2/models/blobs")).json()["version"])


async def send(client: httpx.AsyncClient, count: int = 3, **params: Any) -> None:
    for _ in range(count):
        response = await client.post("/segment", content=PICTURE, params=params)
        assert response.status_code == 200
        assert response.json()["version"] == 1 or await get_version(client) == 2


async def wait_for(client: httpx.AsyncClient, status: str) -> dict[str, Any]:
    for _ in range(3000):
        shadow = await get_shadow(client)
        if shadow["status"] == status:
            return shadow
        await asyncio.sleep(0.01)
    raise AssertionError(shadow)


def read_policy(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["serve"]


async def test_a_version_that_agrees_is_promoted(
    client: httpx.AsyncClient, app: FastAPI, folder: Path
) -> None:
    assert (await client.get("/v2/models/blobs")).json()["versions"] == ["1"]
    assert (await client.post("/segment", params={"version": 2})).status_code == 404
    await send(client)
    state = await wait_for(client, "promoted")
    assert (state["version"], state["images"], state["agreement"]) == (2, 3, 1.0)
    assert (state["mean_iou"], state["unmatched_share"], state["score_difference"]) == (1.0, 0, 0)
    assert "at least 0.95" in state["reason"]
    for _ in range(1000):
        if await get_version(client) == 2:
            break
        await asyncio.sleep(0.01)
    assert await get_version(client) == 2
    assert read_policy(folder) == {"policy": "specific", "versions": [2]}
    assert (await client.post("/segment", content=PICTURE)).json()["version"] == 2
    text = (await client.get("/metrics")).text
    labels = 'model="blobs",version="2"'
    assert 'solo_shadow_images_total{model="blobs",outcome="compared",version="2"} 3.0' in text
    assert f"solo_shadow_agreement_sum{{{labels}}} 3.0" in text
    assert f"solo_shadow_running{{{labels}}} 0.0" in text
    assert 'solo_shadow_decisions_total{decision="promoted",model="blobs"} 1.0' in text


def lose(found: Any) -> Any:
    for candidates in found:
        candidates.scores[:] = 0.0
    return found


def fail(found: Any) -> Any:
    raise RuntimeError("no such kernel")


def change_shape(found: Any) -> Any:
    return [*found, *found]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lose, "mean agreement of 3 images is 0.000, below 0.8"),
        (fail, "failed on 1 images, 0 are allowed: RuntimeError: no such kernel"),
        (change_shape, "failed on 1 images, 0 are allowed: ValueError"),
    ],
)
async def test_a_broken_version_is_rejected_and_no_request_notices(
    client: httpx.AsyncClient,
    folder: Path,
    engine: ShadowEngine,
    change: Any,
    reason: str,
) -> None:
    engine.change = change
    await send(client)
    state = await wait_for(client, "rejected")
    assert reason in state["reason"]
    await wait_until(engine.closed.is_set)
    assert await get_version(client) == 1
    await wait_until(lambda: read_policy(folder) == {"policy": "specific", "versions": [1]})
    await send(client)
    assert (await get_shadow(client))["status"] == "rejected"


async def test_an_engine_call_that_hangs_is_given_up(
    client: httpx.AsyncClient, engine: ShadowEngine
) -> None:
    released = threading.Event()
    engine.change = lambda found: released.wait(60) and found
    await send(client)
    state = await wait_for(client, "rejected")
    assert "ShadowHung: a call has not returned after 2 s" in state["reason"]
    released.set()


@pytest.mark.parametrize("folder", [{"max_slowdown": 3.0}], indirect=True)
async def test_a_slow_version_is_rejected(client: httpx.AsyncClient, engine: ShadowEngine) -> None:
    def delay(found: Any) -> Any:
        time.sleep(1.0)
        return found

    engine.change = delay
    await send(client)
    state = await wait_for(client, "rejected")
    assert "times as long, 3 is allowed" in state["reason"]
    assert state["slowdown"] > 3


async def test_it_runs_only_while_no_request_is_in_flight(
    client: httpx.AsyncClient, app: FastAPI, engine: ShadowEngine
) -> None:
    with app.state.segmenter.admission.request(OTHER):
        await send(client, 2)
        for _ in range(20):
            await asyncio.sleep(0.01)
        assert engine.calls == 0
    await wait_until(lambda: engine.calls >= 2)


async def test_what_there_is_no_time_for_is_dropped(
    client: httpx.AsyncClient,
    app: FastAPI,
    engine: ShadowEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shadow_module, "PATIENCE_S", 0.05)
    with app.state.segmenter.admission.request(OTHER):
        await send(client, 2)
        for _ in range(1000):
            if (await get_shadow(client))["dropped"] == 2:
                break
            await asyncio.sleep(0.01)
    assert (await get_shadow(client))["dropped"] == 2
    assert engine.calls == 0


async def test_a_full_queue_drops_and_other_answers_are_not_compared(
    client: httpx.AsyncClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadow_module, "MAX_WAITING_BYTES", len(PICTURE))
    with app.state.segmenter.admission.request(OTHER):
        await send(client, 4, masks="polygon")
        assert (await get_shadow(client))["dropped"] == 0
        await send(client, 4)
        dropped = (await get_shadow(client))["dropped"]
        assert 2 <= dropped <= 3  # one waits, and one may be in work


@pytest.mark.parametrize("folder", [{"share": 0.25, "images": 100}], indirect=True)
async def test_the_share_of_the_images_is_kept(client: httpx.AsyncClient, app: FastAPI) -> None:
    await send(client, 12)
    await wait_until(lambda: app.state.segmenter.find("blobs", None).shadow.images == 3)


async def test_a_policy_that_is_withdrawn_ends_the_shadow(
    client: httpx.AsyncClient, app: FastAPI, folder: Path, engine: ShadowEngine
) -> None:
    serve(folder, {"policy": "specific", "versions": [1]})
    await app.state.segmenter.load("blobs")
    await wait_until(engine.closed.is_set)
    assert (await get_shadow(client))["status"] is None


async def test_a_verdict_that_cannot_be_written_changes_nothing(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("read-only file system")

    monkeypatch.setattr(shadows_module, "edit_config", refuse)
    await send(client)
    state = await wait_for(client, "failed")
    assert "cannot be carried out: read-only file system" in state["reason"]
    assert await get_version(client) == 1


async def test_a_damaged_shadow_does_not_stop_the_served_version(
    settings: Settings, folder: Path, open_client: OpenClient
) -> None:
    (folder / "2" / "model.onnx").write_bytes(b"damaged")
    app = create_app(settings, load_repository(settings.model_repo, OPTIONS))
    async with open_client(app) as client:
        state = await wait_for(client, "failed")
        assert "blobs/2/model.onnx: has 7 bytes" in state["reason"]
        await send(client, 1)


def test_pixels_are_counted_by_their_bytes() -> None:
    pixels: UInt8 = np.zeros((3, 4, 3), np.uint8)
    assert shadow_module._count_bytes(ImageFile(None, pixels)) == 36
    assert shadow_module._count_bytes(ImageFile(None, b"abc")) == 3
