"""`EngineRenewal.replace`: dead engines and faster engines; one operation for both."""

from __future__ import annotations

import asyncio
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.engines.base import Backend, BackendError
from service.engines.state import EngineBuild
from service.errors import DeviceError, EngineRestarting, ModelRefused
from service.models import renewal
from service.models.repository import LoadedModel, Repository, load_repository
from service.settings import Settings
from tests.service.conftest import OPTIONS
from tests.service.models.test_store import wait_for_retirement
from tests.support.model_folder import add_version, edit_config
from tests.support.stores import Controlled, FakeUpgrade, engine_of, infer, open_store, until


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renewal, "FIRST_PAUSE_S", 0.01)


def graph_of(model_repo: Path) -> Path:
    return model_repo / "blobs" / "1" / "model.onnx"


class TestDeadEngines:
    async def test_a_dead_engine_is_built_again_from_its_own_version(
        self, settings: Settings, model_repo: Path
    ) -> None:
        add_version(model_repo / "blobs", 2)
        edit_config(model_repo / "blobs", lambda content: content.update(serve={"policy": "all"}))
        async with open_store(settings) as store:
            one, two = store.find("blobs", 1), store.find("blobs", 2)
            dead = engine_of(one)
            dead.dead = True
            (wanted,), (found,) = await infer(two), await infer(one)
            assert (found.scores == wanted.scores).all()
            assert one.engine.current is not dead
            await until(lambda: dead.closed)
            assert one.loaded.version == 1 and one.loaded.backend is one.engine.current
            assert engine_of(two).name == "first"
            restarts = store._metrics.engine_restarts.labels("blobs")
            await until(lambda: restarts._value.get() == 1)

    @pytest.mark.usefixtures("quick")
    async def test_building_is_tried_until_it_succeeds_and_calls_wait(
        self, settings: Settings, model_repo: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        graph = graph_of(model_repo)
        content = graph.read_bytes()
        async with open_store(settings) as store:
            model = store.find("blobs", None)
            engine_of(model).dead = True
            graph.write_bytes(b"broken")
            call = asyncio.create_task(infer(model))
            await until(lambda: caplog.text.count("no new engine yet") >= 3)
            with pytest.raises(EngineRestarting, match="'blobs' has died"):
                store.find("blobs", None)
            assert not call.done()
            graph.write_bytes(content)
            assert len(await call) == 1
            assert store.find("blobs", None) is model
        pauses = [float(p) for p in re.findall(r"next attempt in ([\d.]+) s", caplog.text)]
        assert pauses == [0.01 * 2**n for n in range(len(pauses))]

    @pytest.mark.usefixtures("quick")
    async def test_the_pause_is_bounded_and_closing_ends_the_attempts(
        self,
        settings: Settings,
        monkeypatch: pytest.MonkeyPatch,
        model_repo: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(renewal, "LONGEST_PAUSE_S", 0.02)
        async with open_store(settings) as store:
            model = store.find("blobs", None)
            engine_of(model).dead = True
            graph_of(model_repo).unlink()
            call = asyncio.create_task(infer(model))
            await until(lambda: caplog.text.count("next attempt in 0.02 s") >= 3)
            await store.close(finished=False)
            with pytest.raises(BackendError, match="closed"):
                await call
            await until(lambda: not model.builds)

    @pytest.mark.usefixtures("quick")
    async def test_a_version_that_has_ended_is_not_built_again(
        self, settings: Settings, model_repo: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with open_store(settings) as store:
            model = store.find("blobs", None)
            engine_of(model).dead = True
            graph_of(model_repo).unlink()
            call = asyncio.create_task(infer(model))
            await until(lambda: "no new engine yet" in caplog.text)
            await store.unload("blobs")
            await wait_for_retirement(store)
            with pytest.raises(BackendError, match="closed"):
                await call
            await until(lambda: not model.builds)

    async def test_a_death_that_is_reported_after_the_end_builds_nothing(
        self, settings: Settings, model_repo: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with open_store(settings) as store:
            model = store.find("blobs", None)
            await store.unload("blobs")
            await wait_for_retirement(store)
            monkeypatch.setattr(store.renewal, "replace", None)  # not called
            store.renewal.report_death(model)
            await asyncio.sleep(0.05)
            assert not model.builds

    async def test_an_engine_that_is_built_for_nobody_is_closed(self, settings: Settings) -> None:
        built: list[Controlled] = []
        async with open_store(settings) as store:
            model = store.find("blobs", None)

            def build() -> LoadedModel:
                built.append(Controlled(None))
                return replace(model.loaded, backend=built[-1])

            await store.unload("blobs")
            await wait_for_retirement(store)
            await store.renewal.replace(model, build)
            assert built[0].closed and "blobs" not in store.served
            task = asyncio.create_task(store.renewal.replace(model, build))
            await asyncio.sleep(0)
            task.cancel()
            await until(lambda: len(built) == 2 and built[1].closed)


class TestUpgrades:
    async def test_the_first_engine_serves_until_the_faster_one_is_warm(
        self, settings: Settings
    ) -> None:
        upgrade = FakeUpgrade()
        async with open_store(settings, upgrade) as store:
            model = store.find("blobs", None)
            first = engine_of(model)
            await until(lambda: model.engine.build == EngineBuild("compiling", 0.25))
            assert len(await infer(model)) == 1
            upgrade.engine.go.clear()
            upgrade.may_build.set()
            assert await asyncio.to_thread(upgrade.engine.inside.wait, 10)  # it is warmed up
            assert model.engine.current is first
            assert model.engine.build == EngineBuild("loading", 1.0)
            upgrade.engine.go.set()
            await until(lambda: model.engine.build == EngineBuild("done", 1.0))
            assert model.state.engine.name == "faster" and first.closed
            assert len(await infer(model)) == 1
            assert store.find("blobs", None) is model and upgrade.loads == 1

    async def test_a_call_in_flight_finishes_on_the_first_engine(self, settings: Settings) -> None:
        upgrade = FakeUpgrade()
        async with open_store(settings, upgrade) as store:
            model = store.find("blobs", None)
            first = engine_of(model)
            first.go.clear()
            call = asyncio.create_task(infer(model))
            assert await asyncio.to_thread(first.inside.wait, 10)
            upgrade.may_build.set()
            await until(lambda: model.engine.current is upgrade.engine)
            assert not first.closed and not call.done()
            first.go.set()
            assert len(await call) == 1
            await until(lambda: first.closed)

    @pytest.mark.parametrize("when", ["building", "loading", "warming"])
    async def test_a_failure_leaves_the_first_engine_and_says_why(
        self, settings: Settings, when: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        upgrade = FakeUpgrade(OSError("no memory") if when == "building" else None)
        upgrade.engine.dead = when == "warming"

        def fail() -> Backend:
            raise OSError("no memory")

        if when == "loading":
            monkeypatch.setattr(upgrade, "load", fail)
        async with open_store(settings, upgrade) as store:
            model = store.find("blobs", None)
            upgrade.may_build.set()
            await until(lambda: "failed" in str(model.engine.build))
            assert model.engine.build is not None
            assert ("bad allocation" if when == "warming" else "no memory") in (
                model.engine.build.status
            )
            assert upgrade.engine.closed is (when == "warming")
            assert len(await infer(model)) == 1 and not engine_of(model).closed

    @pytest.mark.parametrize("by", ["closing", "unloading"])
    async def test_a_build_is_cancelled_when_its_version_ends(
        self, settings: Settings, by: str
    ) -> None:
        upgrade = FakeUpgrade()
        async with open_store(settings, upgrade) as store:
            model = store.find("blobs", None)
            await until(lambda: model.engine.build is not None)
            if by == "unloading":
                await store.unload("blobs")
            else:
                await store.close(finished=True)
            await until(upgrade.cancelled.is_set)
            await until(lambda: not model.builds)
            assert upgrade.loads == 0

    async def test_an_engine_that_dies_meanwhile_does_not_start_a_second_build(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        upgrade, second = FakeUpgrade(), FakeUpgrade()

        def rebuild(self: Repository, model: LoadedModel) -> LoadedModel:
            engine = Controlled(upgrade.engine.engine, "rebuilt")
            engine.upgrade = second
            return replace(model, backend=engine)

        monkeypatch.setattr(Repository, "rebuild", rebuild)
        async with open_store(settings, upgrade) as store:
            model = store.find("blobs", None)
            engine_of(model).dead = True
            assert len(await infer(model)) == 1
            await until(lambda: len(model.builds) <= 1)
            assert model.engine.current.name == "rebuilt"
            second.may_build.set()
            upgrade.may_build.set()
            await until(lambda: not model.builds)
            assert model.engine.current is upgrade.engine
            assert (upgrade.loads, second.loads) == (1, 0)

    async def test_the_policy_follows_the_engine(self, settings: Settings) -> None:
        upgrade = FakeUpgrade()
        upgrade.engine.device = "cuda"
        async with open_store(settings, upgrade) as store:
            model = store.find("blobs", None)
            assert model.state.max_batch == 1
            upgrade.may_build.set()
            await until(lambda: model.state.max_batch == 8)
            assert model.scheduler.policy.max_delay_s == 0.005
            assert store._metrics.batch_limit.labels("blobs")._value.get() == 8


@pytest.mark.usefixtures("quick")
class TestLastingFailures:
    """An error of CUDA may last until the process ends: then only another process helps."""

    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"max_rebuilds": 3})

    @pytest.mark.parametrize("kind", [BackendError, MemoryError, DeviceError, "fallback"])
    async def test_after_some_attempts_the_process_has_failed(
        self,
        settings: Settings,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        kind: Any,
    ) -> None:
        built: list[Controlled] = []

        def fail(self: Repository, model: LoadedModel) -> LoadedModel:
            if kind == "fallback":
                built.append(Controlled(None, "on another device"))
                built[-1].device = "cuda"
                return replace(model, backend=built[-1])
            try:
                raise kind("CUDA error 700")
            except BackendError as error:  # as `load_version` does
                raise ModelRefused(self.root / "blobs", str(error)) from error

        monkeypatch.setattr(Repository, "rebuild", fail)
        async with open_store(settings) as store:
            model = store.find("blobs", None)
            engine_of(model).dead = True
            call = asyncio.create_task(infer(model))
            await until(lambda: store.renewal.failure is not None)
            with pytest.raises(BackendError, match="closed"):  # what waited is answered
                await call
            with pytest.raises(EngineRestarting):
                store.find("blobs", None)
            assert len(await infer(store.find("wide", None))) > 0
        assert caplog.text.count("no new engine yet") == 2
        reason = "the engine of model 'blobs' has failed: 3 attempts to replace it failed: "
        assert str(store.renewal.failure).startswith(reason)
        assert ("CUDA error 700" in str(store.renewal.failure)) is (kind != "fallback")
        assert [engine.closed for engine in built] == [True] * (3 if kind == "fallback" else 0)

    async def test_missing_files_may_come_back(
        self, settings: Settings, model_repo: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = model_repo / "blobs" / "config.json"
        content = config.read_bytes()
        async with open_store(settings) as store:
            model = store.find("blobs", None)
            engine_of(model).dead = True
            graph_of(model_repo).rename(model_repo / "away")
            call = asyncio.create_task(infer(model))
            await until(lambda: caplog.text.count("no new engine yet") >= 2)
            config.write_bytes(b"{")
            await until(lambda: caplog.text.count("no new engine yet") >= 4)
            assert store.renewal.failure is None and not call.done()
            config.write_bytes(content)
            (model_repo / "away").rename(graph_of(model_repo))
            assert len(await call) == 1
            assert store.renewal.failure is None

    async def test_failures_are_counted_in_a_row(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rebuild, failures = Repository.rebuild, [0]

        def fail_twice(self: Repository, model: LoadedModel) -> LoadedModel:
            failures[0] += 1
            if failures[0] % 3:
                raise BackendError("not yet")
            return replace(model, backend=Controlled(rebuild(self, model).backend))

        monkeypatch.setattr(Repository, "rebuild", fail_twice)
        async with open_store(settings) as store:
            model = store.find("blobs", None)
            for _ in range(2):
                engine_of(model).dead = True
                assert len(await infer(model)) == 1
            assert failures == [6] and store.renewal.failure is None

    async def test_an_attempt_that_hangs_is_the_last(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(renewal, "REBUILD_S", 0.05)
        go = threading.Event()

        def hang(self: Repository, model: LoadedModel) -> LoadedModel:
            assert go.wait(20)
            raise BackendError("too late")

        monkeypatch.setattr(Repository, "rebuild", hang)
        async with open_store(settings) as store:
            engine_of(store.find("blobs", None)).dead = True
            with pytest.raises(BackendError, match="closed"):
                await infer(store.find("blobs", None))
            assert str(store.renewal.failure).endswith("an attempt to replace it hangs for 0.05 s")
            go.set()


def test_a_repository_is_closed_with_its_engines(settings: Settings) -> None:
    engine = Controlled(None)
    loaded = load_repository(settings.model_repo, OPTIONS)
    model = replace(loaded.models["blobs"][1], backend=engine)
    Repository(loaded.root, {"blobs": {1: model}}, {}).close()
    assert engine.closed
