"""Loading a model again: its versions, and the engines that are replaced meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.engines.base import Backend
from service.errors import ModelUnavailable
from service.models import repository as repository_module
from service.models import store as store_module
from service.models.repository import LoadedModel
from service.settings import Settings
from tests.service.models.test_store import wait_for_retirement
from tests.support.blob_model import publish
from tests.support.model_folder import add_version, edit_config
from tests.support.stores import Controlled, FakeUpgrade, engine_of, infer, open_store, until


async def test_two_loads_at_once_build_one_after_the_other(
    settings: Settings, model_repo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with open_store(settings) as store:
        add_version(model_repo / "blobs", 2)
        both = await asyncio.gather(store.load("blobs"), store.load("blobs"))
        assert list(both) == [[2], [2]]
        await wait_for_retirement(store)
    assert caplog.text.count("model blobs version 1 has ended") == 1


async def test_an_engine_that_is_replaced_during_a_load_goes_on(
    settings: Settings, model_repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upgrade = FakeUpgrade()
    go, inside = threading.Event(), threading.Event()
    load_model = repository_module.load_model

    def load_slowly(*arguments: Any) -> dict[int, LoadedModel]:
        inside.set()
        assert go.wait(10)
        return load_model(*arguments)

    monkeypatch.setattr(store_module, "load_model", load_slowly)
    async with open_store(settings, upgrade) as store:
        model = store.find("blobs", None)
        load = asyncio.create_task(store.load("blobs"))
        assert await asyncio.to_thread(inside.wait, 10)
        upgrade.may_build.set()
        await until(lambda: model.engine.current is upgrade.engine)
        go.set()
        assert await load == [1]
        assert store.find("blobs", None) is model
        assert not engine_of(model).closed


async def test_a_load_does_not_build_an_engine_twice(settings: Settings) -> None:
    upgrade = FakeUpgrade()
    async with open_store(settings, upgrade) as store:
        model = store.find("blobs", None)
        assert len(model.builds) == 1
        assert await store.load("blobs") == [1]
        assert store.find("blobs", None) is model and len(model.builds) == 1
        upgrade.may_build.set()
        await until(lambda: not model.builds)
        assert upgrade.loads == 1


async def test_a_model_loaded_at_run_time_is_rebuilt_and_counted(
    settings: Settings, model_repo: Path
) -> None:
    async with open_store(settings) as store:
        publish(model_repo, "late")
        assert await store.load("late") == [1]
        model = store.find("late", None)
        dead = Controlled(model.engine.current)
        dead.dead = True
        model.engine.swap(dead)
        assert len(await infer(model)) == 1
        assert model.engine.current is not dead
        restarts = store._metrics.engine_restarts.labels("late")
        await until(lambda: restarts._value.get() == 1)
        page = (await store._metrics.answer(""))[0].decode()
        assert 'model="late",precision="fp32",version="1"} 1.0' in page


async def test_engines_of_a_load_that_fails_are_closed(
    settings: Settings, model_repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Controlled] = []
    build: Callable[..., Backend] = vars(repository_module)["build_backend"]

    def watch(*arguments: Any) -> Backend:
        built.append(Controlled(build(*arguments)))
        return built[-1]

    async with open_store(settings) as store:
        monkeypatch.setattr(repository_module, "build_backend", watch)
        add_version(model_repo / "blobs", 2)
        add_version(model_repo / "blobs", 3, graph=b"broken")
        wanted = {"policy": "specific", "versions": [2, 3]}
        edit_config(model_repo / "blobs", lambda content: content.update(serve=wanted))
        with pytest.raises(ModelUnavailable, match=r"blobs/3/model\.onnx"):
            await store.load("blobs")
        assert [engine.closed for engine in built] == [True]
        assert sorted(store.served["blobs"]) == [1]
