"""What a store shows of its models, and how versions, engines and builds of them end."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline.postprocess import TileCandidates
from pipeline.types import Tile
from service.engines.base import Backend
from service.engines.state import EngineBuild
from service.errors import Draining, EngineError, ModelUnavailable
from service.models import renewal
from service.models import repository as repository_module
from service.models import store as store_module
from service.models.repository import LoadedModel, Repository, load_repository
from service.models.served import ServedModel
from service.models.store import ModelStore
from service.observe.metrics import Metrics
from service.segmenter import LocalSegmenter
from service.settings import Settings
from service.work.image import ImageWork
from service.work.pixels import PixelBudget
from service.work.request import ImageFile, Outcome, RequestOptions
from tests.service.conftest import OPTIONS
from tests.service.models.test_store import wait_for_retirement
from tests.support.blob_model import build_graph, draw_picture, publish
from tests.support.canvases import build_job
from tests.support.metrics import render
from tests.support.model_folder import add_version, edit_config
from tests.support.stores import Controlled, FakeUpgrade, engine_of, infer, open_store, until


def start(model: ServedModel) -> asyncio.Task[Outcome]:
    """An image that is given to a version's scheduler; the store counts no request."""
    image = ImageFile(None, draw_picture(48, 48))
    work = ImageWork(image, (48, 48), 1, model.config, RequestOptions())
    job = build_job(work)

    async def run() -> Outcome:
        await model.scheduler.run(job)
        assert work.outcome is not None
        return work.outcome

    return asyncio.create_task(run())


async def hold(model: ServedModel) -> asyncio.Task[Outcome]:
    """An image whose engine call does not return until `go` of the engine is set."""
    engine = engine_of(model)
    engine.go.clear()
    task = start(model)
    assert await asyncio.to_thread(engine.inside.wait, 10)
    return task


def is_made_faster(model: ServedModel, upgrade: FakeUpgrade) -> bool:
    return model.engine.current is upgrade.engine


class TestWhatIsShown:
    def test_all_models_share_the_budget_of_decoded_pixels(self, settings: Settings) -> None:
        repository, budget = load_repository(settings.model_repo, OPTIONS), PixelBudget(1000)
        store = ModelStore(settings, repository, Metrics(), budget)
        assert len(store.all_models) == 2
        assert all(model.scheduler._queue.budget is budget for model in store.all_models)
        repository.close()

    async def test_models_are_listed_by_name_and_version(
        self, settings: Settings, model_repo: Path
    ) -> None:
        add_version(model_repo / "blobs", 2)
        edit_config(model_repo / "blobs", lambda content: content.update(serve={"policy": "all"}))
        publish(model_repo, "aaa")
        async with open_store(settings) as store:
            await store.unload("aaa")
            await store.load("aaa")
            found = [(model.name, model.loaded.version) for model in store.all_models]
            assert found == [("aaa", 1), ("blobs", 1), ("blobs", 2), ("wide", 1)]

    async def test_a_model_is_refused_until_it_is_mended(
        self, settings: Settings, model_repo: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with open_store(settings) as store:
            assert 'solo_model_refused{model="broken"} 1.0' in render(store._metrics)
            assert store.unavailable["broken"].startswith("broken/1/model.onnx: ")
            caplog.clear()
            with pytest.raises(ModelUnavailable):
                await store.load("broken")
            assert "model broken is not loaded: broken/1/model.onnx: " in caplog.text
            (model_repo / "broken" / "1" / "model.onnx").write_bytes(build_graph())
            assert await store.load("broken") == [1]
            assert "broken" not in store.unavailable
            await store.unload("broken")
            assert store.unavailable["broken"] == "unloaded"
            assert 'solo_model_refused{model="broken"} 0.0' in render(store._metrics)

    async def test_engine_calls_are_counted(self, settings: Settings) -> None:
        async with open_store(settings) as store:
            model = store.find("blobs", None)
            engine = engine_of(model)
            infer_well = engine.infer

            def fail_once(tiles: Sequence[Tile]) -> Sequence[TileCandidates]:
                engine.infer = infer_well  # type: ignore[method-assign]
                raise ValueError("not this image")

            assert (await start(model)).error is None
            engine.infer = fail_once  # type: ignore[method-assign]
            assert isinstance((await start(model)).error, EngineError)
            page = render(store._metrics)
            assert 'solo_batch_size_count{model="blobs",version="1"} 2.0' in page
            assert 'solo_engine_failures_total{model="blobs"} 1.0' in page


class TestEnds:
    async def test_closing_waits_for_versions_that_are_ending(self, settings: Settings) -> None:
        async with open_store(settings) as store:
            with store.use("blobs", None) as model:
                engine = engine_of(model)
                await store.unload("blobs")
                await asyncio.sleep(0.05)
                assert not engine.closed
                await asyncio.wait_for(store.close(finished=False), 10)
                assert engine.closed

    async def test_what_an_engine_has_in_flight_is_finished(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(store_module, "LAST_CALL_S", 20.0)
        async with open_store(settings) as store:
            model = store.find("blobs", None)
            engine = engine_of(model)
            request = await hold(model)
            await store.unload("blobs")
            await asyncio.sleep(0.05)
            assert not request.done() and not engine.closed
            engine.go.set()
            assert (await request).error is None
            await wait_for_retirement(store)
            assert engine.closed

    async def test_a_request_that_outlasts_the_drain_is_given_up(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(store_module, "LAST_CALL_S", 60.0)
        short = settings.model_copy(update={"drain_timeout_s": 0.1})
        async with open_store(short) as store:
            with store.use("blobs", None) as model:
                engine = engine_of(model)
                request = await hold(model)
                await store.unload("blobs")
                with pytest.raises(Draining):
                    await asyncio.wait_for(request, 10)
                await wait_for_retirement(store)
                assert engine.closed
                engine.go.set()

    async def test_nothing_is_waited_for_from_a_dead_engine(
        self, settings: Settings, model_repo: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(store_module, "LAST_CALL_S", 60.0)
        async with open_store(settings) as store:
            model = store.find("blobs", None)
            engine_of(model).dead = True
            (model_repo / "blobs" / "1" / "model.onnx").unlink()
            request = start(model)
            await until(lambda: not model.engine.is_alive)
            await asyncio.wait_for(store.close(finished=True), 10)
            with pytest.raises(Draining):
                await request


class TestBuilds:
    async def test_there_is_a_pause_between_attempts(
        self,
        settings: Settings,
        model_repo: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(renewal, "FIRST_PAUSE_S", 0.2)
        async with open_store(settings) as store:
            model = store.find("blobs", None)
            engine_of(model).dead = True
            (model_repo / "blobs" / "1" / "model.onnx").unlink()
            call = asyncio.create_task(infer(model))
            await until(lambda: caplog.text.count("no new engine yet") >= 3)
            call.cancel()
        failures = [r.created for r in caplog.records if "no new engine yet" in r.message]
        gaps = [later - earlier for earlier, later in pairwise(failures[:3])]
        assert gaps[0] > 0.19 and gaps[1] > 0.38

    def test_the_pauses_grow_from_a_second_to_a_minute(self) -> None:
        assert (renewal.FIRST_PAUSE_S, renewal.LONGEST_PAUSE_S) == (1, 60)

    async def test_every_engine_that_is_built_again_is_made_faster(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        upgrades = [FakeUpgrade(), FakeUpgrade()]
        waiting = list(upgrades)

        def rebuild(self: Repository, model: LoadedModel) -> LoadedModel:
            engine = Controlled(upgrades[0].engine.engine, "rebuilt")
            engine.upgrade = waiting.pop(0)
            return replace(model, backend=engine)

        monkeypatch.setattr(Repository, "rebuild", rebuild)
        async with open_store(settings) as store:
            model = store.find("blobs", None)
            for upgrade in upgrades:
                upgrade.engine.engine = engine_of(model).engine
                upgrade.may_build.set()
                engine_of(model).dead = True
                assert len(await infer(model)) == 1
                await until(partial(is_made_faster, model, upgrade))
                await until(lambda: not model.builds)
            assert waiting == []
        assert caplog.text.count("a new engine is ready on cpu (rebuilt)") == 2
        assert caplog.text.count("the engine is faster now") == 2

    async def test_a_version_that_is_loaded_later_is_made_faster_too(
        self, settings: Settings, model_repo: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        upgrade = FakeUpgrade()
        build = vars(repository_module)["build_backend"]

        def build_slow(*arguments: Any) -> Backend:
            engine = Controlled(build(*arguments))
            engine.upgrade, upgrade.engine.engine = upgrade, engine.engine
            return engine

        async with open_store(settings) as store:
            monkeypatch.setattr(repository_module, "build_backend", build_slow)
            add_version(model_repo / "blobs", 2)
            assert await store.load("blobs") == [2]
            model = store.find("blobs", 2)
            upgrade.may_build.set()
            await until(lambda: model.engine.build == EngineBuild("done", 1.0))
            assert is_made_faster(model, upgrade)

    async def test_a_build_is_announced_before_it_reports(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        upgrade = FakeUpgrade()
        monkeypatch.setattr(upgrade, "build", lambda report: upgrade.may_build.wait(10))
        async with open_store(settings, upgrade) as store:
            model = store.find("blobs", None)
            await until(lambda: model.engine.build is not None)
            assert model.engine.build == EngineBuild("building the engine", 0.0)
            upgrade.may_build.set()
            await until(partial(is_made_faster, model, upgrade))

    async def test_a_build_that_fails_keeps_its_progress(
        self, settings: Settings, caplog: pytest.LogCaptureFixture
    ) -> None:
        upgrade = FakeUpgrade(OSError("no memory"))
        async with open_store(settings, upgrade) as store:
            model = store.find("blobs", None)
            upgrade.may_build.set()
            await until(lambda: not model.builds)
            assert model.engine.build == EngineBuild("failed: no memory", 0.25)
        assert "first goes on, the faster engine failed: no memory" in caplog.text


@asynccontextmanager
async def open_watched(settings: Settings, interval_s: float) -> AsyncIterator[LocalSegmenter]:
    """A segmenter that looks at the repository in an interval."""
    watched = settings.model_copy(update={"model_poll_s": interval_s})
    segmenter = LocalSegmenter(watched, load_repository(settings.model_repo, OPTIONS), Metrics())
    segmenter.start()
    try:
        yield segmenter
    finally:
        await segmenter.drain()


class TestWatching:
    async def test_the_repository_is_not_looked_at_before_the_interval(
        self, settings: Settings, model_repo: Path
    ) -> None:
        async with open_watched(settings, 60.0) as segmenter:
            publish(model_repo, "late")
            await asyncio.sleep(0.2)
            assert "late" not in segmenter.store.served

    async def test_a_model_that_has_changed_is_loaded_once(
        self,
        settings: Settings,
        model_repo: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        caplog.set_level("INFO")
        async with open_watched(settings, 0.01) as segmenter:
            store, loaded = segmenter.store, list[str]()
            load = store.load

            async def watch(name: str) -> list[int]:
                loaded.append(name)
                return await load(name)

            monkeypatch.setattr(store, "load", watch)
            publish(model_repo, "late")
            await until(lambda: re.search(r"model late .*served in version .?1", caplog.text))
            assert "late" in store.served
            await asyncio.sleep(0.1)
            assert loaded.count("late") == 1 and len(loaded) == len(set(loaded))

    async def test_a_refused_model_that_vanishes_is_forgotten(
        self, settings: Settings, model_repo: Path
    ) -> None:
        async with open_watched(settings, 0.01) as segmenter:
            await asyncio.sleep(0.05)
            assert "broken" in segmenter.unavailable
            shutil.rmtree(model_repo / "broken")
            await until(lambda: "broken" not in segmenter.unavailable)
