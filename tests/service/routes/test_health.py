from __future__ import annotations

import httpx
from fastapi import FastAPI


async def test_a_ready_server(client: httpx.AsyncClient) -> None:
    assert (await client.get("/healthz")).json() == {"status": "ok"}
    assert (await client.get("/v2/health/live")).json() == {"live": True}
    ready = await client.get("/v2/health/ready")
    assert ready.status_code == 200
    assert ready.json() == {
        "ready": True,
        "models": ["blobs:1 on cpu", "wide:1 on cpu"],
        "refused": ["broken"],
    }


async def test_a_draining_server_is_alive_but_not_ready(
    app: FastAPI, client: httpx.AsyncClient
) -> None:
    app.state.segmenter.close_admission()
    assert (await client.get("/v2/health/live")).status_code == 200
    assert (await client.get("/healthz")).json() == {"status": "draining"}
    ready = await client.get("/v2/health/ready")
    assert (ready.status_code, ready.json()["ready"]) == (503, False)
    response = await client.post("/segment", content=b"x")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "draining"
    assert response.headers["retry-after"] == "1"
    assert "solo_ready 0.0" in (await client.get("/metrics")).text
