from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.errors import BodyTimeout
from service.http.app import create_app
from service.http.cors import build_cors_headers, build_cors_options
from service.http.refusals import REFUSAL
from service.models.repository import load_repository
from service.settings import Settings
from tests.service.conftest import MAX_BODY_BYTES, OPTIONS, OpenClient
from tests.support.blob_model import draw_picture, encode_picture
from tests.support.guarded import Echo, GuardedServer

ORIGIN = "https://app.test"
PICTURE = encode_picture(draw_picture())


@pytest.fixture
def shared(settings: Settings) -> FastAPI:
    changed = settings.model_copy(update={"cors_origins": f"https://b.test, {ORIGIN}"})
    return create_app(changed, load_repository(changed.model_repo, OPTIONS))


def break_off(*arguments: object) -> None:
    raise RuntimeError


async def test_every_answer_has_the_headers(
    shared: FastAPI, open_client: OpenClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_client(shared) as client:

        async def ask(status: int, path: str, **sent: Any) -> None:
            method = "POST" if sent else "GET"
            response = await client.request(method, path, headers={"origin": ORIGIN}, **sent)
            assert response.status_code == status
            assert response.headers["access-control-allow-origin"] == ORIGIN
            assert "x-request-id" in response.headers["access-control-expose-headers"]
            assert "Origin" in response.headers["vary"]

        await ask(200, "/segment", content=PICTURE)
        await ask(200, "/healthz")
        await ask(400, "/segment", content=b"")
        await ask(404, "/nowhere")
        await ask(405, "/segment")
        await ask(413, "/segment", content=bytes(MAX_BODY_BYTES + 1))
        await ask(422, "/segment?x=1", content=PICTURE)
        monkeypatch.setattr(shared.state.segmenter, "use", break_off)
        await ask(500, "/segment", content=PICTURE)
        monkeypatch.undo()
        shared.state.segmenter.admission.close()
        await ask(503, "/segment", content=PICTURE)


async def test_a_page_may_delete_a_job_and_read_where_it_is(
    shared: FastAPI, open_client: OpenClient
) -> None:
    asked = {"origin": ORIGIN, "access-control-request-method": "DELETE"}
    async with open_client(shared) as client:
        allowed = await client.options("/v2/jobs/1", headers=asked)
        assert allowed.status_code == 200
        assert "DELETE" in allowed.headers["access-control-allow-methods"]
        answer = await client.get("/healthz", headers={"origin": ORIGIN})
    exposed = answer.headers["access-control-expose-headers"]
    assert {"location", "content-disposition"} <= {name.strip() for name in exposed.split(",")}


async def test_a_body_that_the_guard_refuses_is_answered_with_the_headers(
    settings: Settings,
) -> None:
    changed = settings.model_copy(update={"cors_origins": "*"})
    app = create_app(changed, load_repository(changed.model_repo, OPTIONS))
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/segment",
        "query_string": b"",
        "headers": [(b"origin", ORIGIN.encode())],
        "client": ("a", 1),
        "server": ("test", 80),
        "scheme": "http",
        "root_path": "",
        "state": {REFUSAL: BodyTimeout("too slow")},
    }
    async with app.router.lifespan_context(app):
        await app(scope, receive, send)
    assert sent[0]["status"] == 408
    assert (b"access-control-allow-origin", b"*") in sent[0]["headers"]


async def test_a_refusal_without_the_application_has_the_headers() -> None:
    async with GuardedServer(Echo()) as server:
        server.guard.cors_origins = ORIGIN
        for origin, allowed in ((ORIGIN, True), ("https://c.test", False)):
            head = f"GET / HTTP/1.1\r\nOrigin: {origin}\r\n\r\n"  # without Host
            answer = await server.ask(head.encode())
            assert answer.startswith(b"HTTP/1.1 400 ")
            header = f"access-control-allow-origin: {ORIGIN}\r\n".encode()
            assert (header in answer.lower()) is allowed
            assert b"vary: origin\r\n" in answer.lower()


async def test_a_preflight_is_answered(shared: FastAPI, open_client: OpenClient) -> None:
    async with open_client(shared) as client:
        for origin, status in ((ORIGIN, 200), ("https://c.test", 400)):
            asked = {
                "origin": origin,
                "access-control-request-method": "POST",
                "access-control-request-headers": "x-api-key",
            }
            response = await client.options("/segment", headers=asked)
            assert response.status_code == status
            assert response.headers.get("access-control-allow-origin") == (
                ORIGIN if status == 200 else None
            )


@pytest.mark.parametrize("origins", ["", " ", ",", " , "])
async def test_without_origins_there_are_no_headers(
    settings: Settings, open_client: OpenClient, origins: str
) -> None:
    assert build_cors_options(origins) is None
    assert build_cors_headers(origins, ORIGIN) == []
    changed = settings.model_copy(update={"cors_origins": origins})
    app = create_app(changed, load_repository(changed.model_repo, OPTIONS))
    async with open_client(app) as client:
        response = await client.get("/healthz", headers={"origin": ORIGIN})
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("origins", ["*", f"{ORIGIN},https://b.test"])
@pytest.mark.parametrize("origin", [ORIGIN, "https://c.test", None])
async def test_an_answer_without_the_application_has_the_same_headers(
    settings: Settings, open_client: OpenClient, origins: str, origin: str | None
) -> None:
    changed = settings.model_copy(update={"cors_origins": origins})
    app = create_app(changed, load_repository(changed.model_repo, OPTIONS))
    headers = {} if origin is None else {"origin": origin}
    async with open_client(app) as client:
        response = await client.get("/healthz", headers=headers)
    answered = {
        name: value
        for name, value in response.headers.items()
        if name.startswith("access-control") or name == "vary"
    }
    written = httpx.Headers(build_cors_headers(origins, origin))
    assert written == httpx.Headers(answered)
