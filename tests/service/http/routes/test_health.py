from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from service.engines.state import EngineBuild
from service.errors import StartupError
from service.http.app import create_app
from service.models.repository import load_repository
from service.settings import Settings
from tests.service.conftest import OPTIONS, OpenClient
from tests.support.blob_model import publish


async def test_a_ready_server(client: httpx.AsyncClient) -> None:
    assert (await client.get("/healthz")).json() == {"status": "ok"}
    assert (await client.get("/v2/health/live")).json() == {"live": True}
    ready = await client.get("/v2/health/ready")
    assert ready.status_code == 200
    assert ready.json() == {
        "ready": True,
        "models": ["blobs:1 on cpu", "wide:1 on cpu"],
        "engines": [
            {
                "model": name,
                "version": 1,
                "engine": "onnxruntime",
                "device": "cpu",
                "precision": "fp32",
                "reason": "CPU provider; device cpu was asked for",
                "build": None,
                "canvas_ms": {},
            }
            for name in ("blobs", "wide")
        ],
        "refused": ["broken"],
    }


async def test_an_engine_that_is_built_is_shown_with_its_progress(
    app: FastAPI, client: httpx.AsyncClient
) -> None:
    model = app.state.segmenter.store.find("blobs", None)
    model.engine.build = EngineBuild("building the engine", 0.25)
    engines = (await client.get("/v2/health/ready")).json()["engines"]
    building = {"status": "building the engine", "progress": 0.25}
    assert [engine["build"] for engine in engines] == [building, None]
    metrics = (await client.get("/metrics")).text
    assert 'solo_engine_build_progress{model="blobs"} 0.25' in metrics
    assert 'solo_engine_build_progress{model="wide"} 1.0' in metrics


async def test_a_draining_server_is_alive_but_not_ready(
    app: FastAPI, client: httpx.AsyncClient
) -> None:
    app.state.segmenter.admission.close()
    assert (await client.get("/v2/health/live")).status_code == 200
    assert (await client.get("/healthz")).json() == {"status": "draining"}
    ready = await client.get("/v2/health/ready")
    assert (ready.status_code, ready.json()["ready"]) == (503, False)
    response = await client.post("/segment", content=b"x")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "draining"
    assert response.headers["retry-after"] == "1"
    assert "solo_ready 0.0" in (await client.get("/metrics")).text


async def test_a_server_without_models_is_alive_but_not_ready(
    settings: Settings, open_client: OpenClient, tmp_path: Path
) -> None:
    root = tmp_path / "empty"
    root.mkdir()
    with pytest.raises(StartupError, match="no model folders"):
        load_repository(root, OPTIONS)
    empty = settings.model_copy(update={"model_repo": root, "model_control": True})
    app = create_app(empty, load_repository(root, OPTIONS, may_be_empty=True))
    async with open_client(app) as client:
        assert (await client.get("/v2/health/live")).status_code == 200
        assert (await client.get("/healthz")).json() == {"status": "no_model"}
        ready = await client.get("/v2/health/ready")
        assert (ready.status_code, ready.json()["ready"]) == (503, False)
        assert "solo_ready 0.0" in (await client.get("/metrics")).text
        refused = await client.post("/segment", content=b"x")
        assert refused.json()["error"]["code"] == "unknown_model"
        publish(root)
        assert (await client.post("/v2/repository/models/blobs/load")).status_code == 200
        assert (await client.get("/v2/health/ready")).status_code == 200
        assert (await client.post("/v2/repository/models/blobs/unload")).status_code == 200
        assert (await client.get("/v2/health/ready")).status_code == 503


async def test_a_server_that_must_be_replaced_is_not_alive(
    app: FastAPI, client: httpx.AsyncClient
) -> None:
    app.state.segmenter.store.renewal.failure = "no engine can be built"
    answers = {
        path: await client.get(path) for path in ("/healthz", "/v2/health/live", "/v2/health/ready")
    }
    assert [answer.status_code for answer in answers.values()] == [503] * 3
    assert answers["/healthz"].json() == {"status": "failed"}
    assert answers["/v2/health/live"].json() == {"live": False}
    assert "solo_ready 0.0" in (await client.get("/metrics")).text
