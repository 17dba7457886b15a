"""The tests of the HTTP contract run against the single server and against one on Ray."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.http.app import create_app
from service.http.routes import progress as progress_module
from service.models.repository import load_repository
from service.settings import Settings
from tests.service.conftest import MAX_BODY_BYTES, OPTIONS, OpenClient, publish_models
from tests.support.gate import EngineGate
from tests.support.processes import free_port
from tests.support.ray_nodes import add_node, run_cluster, skip_without_ray
from tests.support.server import RAY_START_S, ROOT

CONTRACT = ("deadlines", "health", "inference", "jobs", "metrics", "models", "segment")
"""What these tests ask of `client` alone holds for both."""
_INSIDE = {"app", "open_client", "settings", "with_jobs"}
"""Fixtures of tests that reach into the application, or need one of their own."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    asked = set(metafunc.definition._fixtureinfo.argnames)
    module = metafunc.module.__name__.rpartition("test_")[2]
    if "client" in asked and not asked & _INSIDE and module in CONTRACT:
        metafunc.parametrize("server", ["single", "ray"], indirect=True)


@pytest.fixture(scope="session")
def ray_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`solo-serve ray` with what the single server of the other tests has."""
    skip_without_ray()
    folder, port = tmp_path_factory.mktemp("ray"), free_port()
    repo = publish_models(folder / "model_repo")
    with run_cluster() as cluster:
        add_node(cluster)
        flags = ["--ray-address", cluster.address, "--port", f"{port}"]
        flags += ["--model-repo", f"{repo}", "--default-model", "blobs"]
        flags += ["--max-body-bytes", f"{MAX_BODY_BYTES}", "--jobs-dir", f"{folder / 'jobs'}"]
        command = [sys.executable, "-m", "service", "ray", *flags]
        subprocess.run(command, cwd=ROOT, check=True, timeout=RAY_START_S)
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def server(request: pytest.FixtureRequest) -> str | FastAPI:
    """The address of the server on Ray, or the single server's application."""
    on_ray = getattr(request, "param", "single") == "ray"
    found: str | FastAPI = request.getfixturevalue("ray_url" if on_ray else "app")
    return found


@pytest.fixture
async def client(
    server: str | FastAPI, open_client: OpenClient
) -> AsyncIterator[httpx.AsyncClient]:
    """Of a server with the models of `publish_models`."""
    if isinstance(server, str):
        async with httpx.AsyncClient(base_url=server, timeout=60) as opened:
            yield opened
        return
    async with open_client(server) as opened:
        yield opened


OpenGated = Callable[..., AbstractAsyncContextManager[tuple[FastAPI, EngineGate]]]


@pytest.fixture
def quick_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """RequestProgress is looked at often, and no heartbeat comes by itself."""
    monkeypatch.setattr(progress_module, "EVERY_S", 0.005)
    monkeypatch.setattr(progress_module, "HEARTBEAT_S", 60.0)


@pytest.fixture
def open_gated(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> OpenGated:
    """Opens an application whose model `blobs` waits for the test before every canvas."""

    @asynccontextmanager
    async def open_it(**changes: Any) -> AsyncIterator[tuple[FastAPI, EngineGate]]:
        changed = settings.model_copy(update=changes)
        repository = load_repository(changed.model_repo, OPTIONS)
        gate = EngineGate(monkeypatch, repository)
        app = create_app(changed, repository)
        async with app.router.lifespan_context(app):
            try:
                yield app, gate
            finally:
                gate.let()

    return open_it
