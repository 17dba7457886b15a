"""POST /segment without FastAPI's dependency solving answers as FastAPI would."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Response
from fastapi.routing import APIRoute

from service.http.app import create_app
from service.http.keys import add_key
from service.http.routes.segment import PATH, segment
from service.models.repository import load_repository
from service.settings import Settings
from tests.service.conftest import OPTIONS, OpenClient
from tests.support.blob_model import draw_picture, encode_picture

PICTURE = encode_picture(draw_picture())
REQUESTS: list[tuple[str, int, dict[str, Any]]] = [
    ("", 200, {}),
    ("?model=blobs&version=1&masks=none&score_threshold=0.5&max_instances=2", 200, {}),
    ("?priority=batch&timeout_ms=60000", 200, {}),
    ("?model=bl%6Fbs", 200, {}),
    ("", 200, {"headers": {"x-timeout-ms": "60000"}}),
    ("", 200, {"headers": {"accept": "image/png"}}),
    ("", 200, {"content": None, "files": [("images", PICTURE), ("images", b"no image")]}),
    ("", 400, {"content": b""}),
    ("", 415, {"content": b"no image"}),
    ("?model=nowhere", 404, {}),
    ("?version=9", 404, {}),
    ("?model=broken", 503, {}),
    ("?model=", 404, {}),
    ("?modell=blobs", 422, {}),
    ("?score_threshold=2&max_instances=none&x=1", 422, {}),
    ("?score_threshold=", 422, {}),
    ("?timeout_ms=0", 422, {"headers": {"x-timeout-ms": "soon"}}),
    ("?timeout_ms=1.5", 422, {}),
    ("?score_threshold=nan", 422, {}),
    ("?version=+1", 422, {}),
    ("?version=%F0%9F%98%80", 422, {}),
    ("?max_instances=", 422, {}),
    ("?", 200, {}),
    ("?&&masks=none&", 200, {}),
    ("", 422, {"headers": {"x-timeout-ms": ""}}),
    ("?timeout_ms=60000", 422, {"headers": {"x-timeout-ms": "0"}}),
]


def build_ordinary(app: FastAPI) -> FastAPI:
    """Gives POST /segment to FastAPI: the same function, on a route of FastAPI's own class."""
    ordinary = APIRoute(PATH, segment, methods=["POST"], response_class=Response)
    app.router.routes.insert(0, ordinary)
    return app


def describe(response: httpx.Response) -> tuple[int, dict[str, str], object]:
    headers = {k: v for k, v in response.headers.items() if k not in ("x-request-id",)}
    if response.headers["content-type"] != "application/json":
        return response.status_code, headers, response.content
    body = response.json()
    body.pop("timing_ms", None)
    body.get("cost", {}).pop("engine_ms", None)
    headers.pop("content-length")  # the times have more or fewer digits
    return response.status_code, headers, body


@pytest.fixture
async def ordinary(settings: Settings, open_client: OpenClient) -> AsyncIterator[httpx.AsyncClient]:
    app = build_ordinary(create_app(settings, load_repository(settings.model_repo, OPTIONS)))
    async with open_client(app) as opened:
        yield opened


@pytest.mark.parametrize(("query", "status", "changes"), REQUESTS)
async def test_the_answer_is_fastapis(
    client: httpx.AsyncClient,
    ordinary: httpx.AsyncClient,
    query: str,
    status: int,
    changes: dict[str, Any],
) -> None:
    sent = {"content": PICTURE, **changes}
    response = await client.post(PATH + query, **sent)
    assert response.status_code == status
    assert describe(response) == describe(await ordinary.post(PATH + query, **sent))


@pytest.mark.parametrize("query", ["", "?modell=blobs"])
async def test_a_missing_key_is_refused_before_anything_is_read(
    settings: Settings, tmp_path: Path, open_client: OpenClient, query: str
) -> None:
    keys = tmp_path / "keys.json"
    key = add_key(keys, "shop")
    changed = settings.model_copy(update={"keys_file": keys})
    apps = [create_app(changed, load_repository(changed.model_repo, OPTIONS)) for _ in range(2)]
    async with open_client(apps[0]) as client, open_client(build_ordinary(apps[1])) as ordinary:
        for headers, status in (
            ({}, 401),
            ({"x-api-key": "unknown"}, 401),
            ({"authorization": f"Bearer {key}"}, 422 if query else 200),
        ):
            response = await client.post(PATH + query, content=PICTURE, headers=headers)
            other = await ordinary.post(PATH + query, content=PICTURE, headers=headers)
            assert response.status_code == status
            assert describe(response) == describe(other)


async def test_requests_are_counted_under_the_route(client: httpx.AsyncClient) -> None:
    await client.post(PATH, content=PICTURE)
    metrics = (await client.get("/metrics")).text
    assert 'solo_requests_total{method="POST",route="/segment",status="200"} 1.0' in metrics


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", PATH, 405), ("POST", PATH + "/", 307)]
)
async def test_what_is_not_the_route_is_not_taken_for_it(
    client: httpx.AsyncClient, ordinary: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    for each in (client, ordinary):
        assert (await each.request(method, path)).status_code == status


async def test_the_two_routes_are_different(
    client: httpx.AsyncClient, ordinary: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else comparing them would say nothing."""

    def explode(request: object) -> None:
        raise RuntimeError

    monkeypatch.setattr("service.http.routes.segment.read_parameters", explode)
    assert (await client.post(PATH, content=PICTURE)).status_code == 500
    assert (await ordinary.post(PATH, content=PICTURE)).status_code == 200
