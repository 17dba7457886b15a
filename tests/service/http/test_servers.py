from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast
from unittest.mock import Mock

import httpx
import pytest
from fastapi import FastAPI
from starlette.datastructures import State

from service.errors import StartupError
from service.http.app import create_admin_app, create_app
from service.http.keys import WRONG_KEYS, add_key
from service.http.servers import build_server, serve_beside
from service.models.repository import load_repository
from service.settings import Settings
from tests.service.conftest import OPTIONS, OpenClient

ADMIN_ROUTES = (("GET", "/metrics"), ("POST", "/v2/repository/index"))
HEALTH_ROUTES = ("/healthz", "/v2/health/live", "/v2/health/ready")


@pytest.fixture
def split(settings: Settings) -> Settings:
    return settings.model_copy(update={"admin_port": 0, "model_control": True})


@pytest.fixture
def split_app(split: Settings) -> FastAPI:
    return create_app(split, load_repository(split.model_repo, OPTIONS))


@pytest.fixture
async def admin(split_app: FastAPI, open_client: OpenClient) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the admin server, with the main server running."""
    async with open_client(split_app):
        transport = httpx.ASGITransport(create_admin_app(split_app), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
            yield client


@pytest.fixture
async def outside(admin: httpx.AsyncClient, split_app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the main server, with the admin server running."""
    transport = httpx.ASGITransport(split_app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://main") as client:
        yield client


@pytest.mark.parametrize(("method", "path"), ADMIN_ROUTES)
async def test_admin_routes_are_only_on_the_admin_port(
    admin: httpx.AsyncClient, outside: httpx.AsyncClient, method: str, path: str
) -> None:
    assert (await admin.request(method, path)).status_code == 200
    refused = await outside.request(method, path)
    assert refused.status_code == 404
    assert "not_found" in refused.text


@pytest.mark.parametrize(("method", "path"), ADMIN_ROUTES)
async def test_without_an_admin_port_they_are_on_the_main_one(
    client: httpx.AsyncClient, method: str, path: str
) -> None:
    assert (await client.request(method, path)).status_code == 200


@pytest.mark.parametrize("path", HEALTH_ROUTES)
async def test_health_is_on_both_ports(
    admin: httpx.AsyncClient, outside: httpx.AsyncClient, path: str
) -> None:
    answers = [await client.get(path) for client in (admin, outside)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json()


async def test_the_admin_port_has_no_segment_route(admin: httpx.AsyncClient) -> None:
    answer = await admin.post("/segment", content=b"x")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


async def test_the_admin_port_controls_the_models_of_the_main_port(
    admin: httpx.AsyncClient, outside: httpx.AsyncClient
) -> None:
    assert (await admin.post("/v2/repository/models/blobs/unload")).status_code == 200
    assert (await outside.get("/v2/models/blobs")).status_code == 503  # known, not served
    assert (await outside.post("/v2/repository/models/blobs/load")).status_code == 404
    assert (await admin.post("/v2/repository/models/blobs/load")).status_code == 200
    assert (await outside.get("/v2/models/blobs")).status_code == 200


async def test_requests_to_both_ports_are_counted_and_have_the_same_headers(
    admin: httpx.AsyncClient, outside: httpx.AsyncClient
) -> None:
    await outside.get("/v2/models")
    response = await admin.get("/metrics", headers={"x-request-id": "mine"})
    assert response.headers["x-request-id"] == "mine"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert 'solo_requests_total{method="GET",route="/v2/models",status="200"} 1.0' in response.text


async def test_an_extension_of_the_admin_port_is_not_listed_on_the_main_port(
    client: httpx.AsyncClient, outside: httpx.AsyncClient
) -> None:
    assert "model_repository" in (await client.get("/v2")).json()["extensions"]
    assert "model_repository" not in (await outside.get("/v2")).json()["extensions"]


class RecordingFront:
    """A front end that says what is done with it."""

    def __init__(self) -> None:
        self.events: list[str] = []

    async def start(self, state: State) -> None:
        self.events.append(f"start, ready: {state.segmenter.is_ready}")
        self.state = state

    async def stop(self, limit_s: float) -> None:
        self.events.append(f"stop within {limit_s:g} s, ready: {self.state.segmenter.is_ready}")


async def test_a_front_end_serves_while_the_application_does(
    settings: Settings, open_client: OpenClient
) -> None:
    app = create_app(settings, load_repository(settings.model_repo, OPTIONS))
    fronts = RecordingFront(), RecordingFront()
    serve_beside(app, fronts, 7)
    async with open_client(app):
        for front in fronts:
            assert front.events == ["start, ready: True"]
    for front in fronts:
        assert front.events[1:] == ["stop within 7 s, ready: True"]
    assert not app.state.segmenter.is_ready


def test_an_admin_port_in_use_is_a_startup_error(split: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        settings = split.model_copy(update={"admin_port": port})
        repository = load_repository(settings.model_repo, OPTIONS)
        with pytest.raises(StartupError, match=rf"admin endpoints on 127.0.0.1:{port}: .*in use"):
            build_server(settings, repository)
        repository.close()


@pytest.mark.parametrize(
    ("trusted", "second"), [("10.1.0.0/16", 401), ("10.1.2.3", 401), ("*", 401), ("127.0.0.1", 429)]
)
async def test_wrong_keys_count_for_the_forwarded_address_only_behind_a_trusted_proxy(
    trusted: str,
    second: int,
    settings: Settings,
    tmp_path: Path,
    open_client: OpenClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.http.keys.MAX_DELAY_S", 0.0)
    add_key(tmp_path / "keys.json", "someone")
    changes = {"keys_file": tmp_path / "keys.json", "trusted_proxies": trusted}
    repository = load_repository(settings.model_repo, OPTIONS)
    server = build_server(settings.model_copy(update=changes), repository, source=Mock())
    server.config.load()
    transport = httpx.ASGITransport(server.config.loaded_app, client=("10.1.2.3", 5000))
    async with (
        open_client(cast(FastAPI, server.config.app)),
        httpx.AsyncClient(transport=transport, base_url="http://main") as client,
    ):

        async def send(address: str) -> int:
            headers = {"x-api-key": "wrong", "x-forwarded-for": address}
            return (await client.post("/v2/models/blobs/infer", headers=headers)).status_code

        statuses = [await send("192.0.2.1") for _ in range(WRONG_KEYS + 1)]
        assert statuses == [401] * WRONG_KEYS + [429]
        assert await send("192.0.2.2") == second
