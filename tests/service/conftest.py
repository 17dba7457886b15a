from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from service.engines.base import BackendOptions
from service.http.app import create_app
from service.models.repository import load_repository
from service.settings import Settings
from tests.support.blob_model import KEEP_RATIO_INPUT, publish

OPTIONS = BackendOptions(device="cpu", threads=1)
MAX_BODY_BYTES = 1_000_000


def publish_models(root: Path) -> Path:
    """Models `blobs` (tiles), `wide` (several canvas shapes, poisonable) and a broken one."""
    publish(root)
    publish(root, "wide", poisonable=True, input=KEEP_RATIO_INPUT)
    broken = publish(root, "broken")
    (broken / "1" / "model.onnx").write_bytes(b"not a graph")
    return root


@pytest.fixture
def model_repo(tmp_path: Path) -> Path:
    """The folder of `publish_models`."""
    return publish_models(tmp_path / "model_repo")


@pytest.fixture
def settings(model_repo: Path) -> Settings:
    return Settings(
        model_repo=model_repo,
        default_model="blobs",
        device="cpu",
        threads=1,
        pool_threads=2,
        max_body_bytes=MAX_BODY_BYTES,
    )


OpenClient = Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.fixture
def open_client() -> OpenClient:
    """Runs an application's lifespan and talks to it without a socket."""

    @asynccontextmanager
    async def open_app(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                yield client

    return open_app


@pytest.fixture
async def app(settings: Settings) -> FastAPI:
    return create_app(settings, load_repository(settings.model_repo, OPTIONS))


@pytest.fixture
async def client(app: FastAPI, open_client: OpenClient) -> AsyncIterator[httpx.AsyncClient]:
    async with open_client(app) as opened:
        yield opened
