"""The shortcut answers as the route does that it passes by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from service.http.app import create_app
from service.http.keys import add_key
from service.http.routes.segment import PATH
from service.http.routes.shortcut import Shortcut
from service.models.repository import load_repository
from service.settings import Settings
from tests.service.conftest import OPTIONS, OpenClient
from tests.support.blob_model import draw_picture, encode_picture

PICTURE = encode_picture(draw_picture())
REQUESTS: list[tuple[str, int, dict[str, Any]]] = [
    ("", 200, {}),
    ("?model=blobs&version=1&masks=none&score_threshold=0.5&max_instances=2", 200, {}),
    ("?priority=batch&timeout_ms=60000", 200, {}),
    ("?masks=none&masks=rle", 200, {}),
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
    ("?version=1&version=x", 422, {}),
    ("?timeout_ms=0", 422, {"headers": {"x-timeout-ms": "soon"}}),
    ("?timeout_ms=1.5", 422, {}),
]


async def pass_by(self: Shortcut, scope: Scope, receive: Receive, send: Send) -> None:
    await self.app(scope, receive, send)


def describe(response: httpx.Response) -> tuple[int, dict[str, str], object]:
    headers = {k: v for k, v in response.headers.items() if k not in ("x-request-id",)}
    if response.headers["content-type"] != "application/json":
        return response.status_code, headers, response.content
    body = response.json()
    body.pop("timing_ms", None)
    headers.pop("content-length")  # the times have more or fewer digits
    return response.status_code, headers, body


@pytest.mark.parametrize(("query", "status", "changes"), REQUESTS)
async def test_both_ways_give_one_answer(
    client: httpx.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
    query: str,
    status: int,
    changes: dict[str, Any],
) -> None:
    sent = {"content": PICTURE, **changes}
    short = await client.post(PATH + query, **sent)
    with monkeypatch.context() as patch:
        patch.setattr(Shortcut, "__call__", pass_by)
        long = await client.post(PATH + query, **sent)
    assert short.status_code == status
    assert describe(short) == describe(long)


@pytest.mark.parametrize("query", ["", "?modell=blobs"])
async def test_a_missing_key_is_refused_before_anything_is_read(
    settings: Settings,
    tmp_path: Path,
    open_client: OpenClient,
    monkeypatch: pytest.MonkeyPatch,
    query: str,
) -> None:
    keys = tmp_path / "keys.json"
    key = add_key(keys, "shop")
    changed = settings.model_copy(update={"keys_file": keys})
    app = create_app(changed, load_repository(changed.model_repo, OPTIONS))
    async with open_client(app) as client:
        for headers, status in (
            ({}, 401),
            ({"x-api-key": "unknown"}, 401),
            ({"authorization": f"Bearer {key}"}, 422 if query else 200),
        ):
            short = await client.post(PATH + query, content=PICTURE, headers=headers)
            with monkeypatch.context() as patch:
                patch.setattr(Shortcut, "__call__", pass_by)
                long = await client.post(PATH + query, content=PICTURE, headers=headers)
            assert short.status_code == status
            assert describe(short) == describe(long)


async def test_requests_by_the_shortcut_are_counted_under_the_route(
    client: httpx.AsyncClient,
) -> None:
    await client.post(PATH, content=PICTURE)
    metrics = (await client.get("/metrics")).text
    assert 'solo_requests_total{method="POST",route="/segment",status="200"} 1.0' in metrics


@pytest.mark.parametrize(("method", "path"), [("GET", PATH), ("POST", PATH + "/")])
async def test_what_is_not_the_route_is_passed_on(
    client: httpx.AsyncClient, method: str, path: str
) -> None:
    assert (await client.request(method, path)).status_code in (307, 405)
