"""`ModelStore.replace`: dead engines, faster engines, versions; one operation for all of them."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.postprocess import TileCandidates
from pipeline.preprocess import prepare
from pipeline.types import Tile
from service.engines.base import Backend, BackendError, Precision
from service.engines.state import EngineBuild
from service.errors import DeviceError, EngineRestarting, ModelRefused, ModelUnavailable
from service.models import repository as repository_module
from service.models import store as store_module
from service.models.repository import LoadedModel, Repository, load_repository
from service.models.served import ServedModel
from service.models.store import ModelStore
from service.observe.metrics import Metrics
from service.settings import Settings
from tests.service.conftest import OPTIONS
from tests.service.models.test_store import add_version, edit, wait_for_retirement
from tests.support.blob_model import draw_picture, publish


class Controlled:
    """An engine around another one that tests can hold, kill and watch.

    Attributes:
        inside: Set by every call; calls wait for `go`.
    """

    device = "cpu"
    precision: Precision = "fp32"
    concurrency = 1

    def __init__(self, engine: Backend | None, name: str = "first") -> None:
        self.name = self.reason = name
        self.engine = engine
        self.dead = self.closed = False
        self.upgrade: FakeUpgrade | None = None
        self.inside, self.go = threading.Event(), threading.Event()
        self.go.set()

    def infer(self, tiles: Sequence[Tile]) -> Sequence[TileCandidates]:
        self.inside.set()
        assert self.go.wait(20)
        if self.dead:
            raise MemoryError("bad allocation")
        assert self.engine is not None
        return self.engine.infer(tiles)

    def close(self) -> None:
        self.closed = True


class FakeUpgrade:
    """Builds `engine` when it is told to.

    Attributes:
        failure: Raised instead, if there is one.
    """

    def __init__(self, failure: Exception | None = None) -> None:
        self.engine = Controlled(None, "faster")
        self.failure = failure
        self.may_build, self.cancelled = threading.Event(), threading.Event()
        self.loads = 0

    def build(self, report: Callable[[str, float], None]) -> None:
        report("compiling", 0.25)
        while not self.may_build.wait(0.01):
            if self.cancelled.is_set():
                raise OSError("cancelled")
        if self.failure is not None:
            raise self.failure

    def load(self) -> Backend:
        self.loads += 1
        return self.engine

    def cancel(self) -> None:
        self.cancelled.set()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "FIRST_PAUSE_S", 0.01)


@asynccontextmanager
async def open_store(
    settings: Settings, upgrade: FakeUpgrade | None = None
) -> AsyncIterator[ModelStore]:
    """A started store whose model `blobs` has controlled engines."""
    repository = load_repository(settings.model_repo, OPTIONS)
    versions = {}
    for version, model in repository.models["blobs"].items():
        engine = Controlled(model.backend)
        if upgrade is not None:
            engine.upgrade, upgrade.engine.engine = upgrade, model.backend
        versions[version] = replace(model, backend=engine)
    repository = replace(repository, models={**repository.models, "blobs": versions})
    store = ModelStore(settings, repository, Metrics())
    store.start()
    try:
        yield store
    finally:
        await store.close(finished=True)


async def infer(model: ServedModel) -> Sequence[TileCandidates]:
    """One call of a model's engine in a thread, as the scheduler makes it."""
    tiles = list(prepare(draw_picture(), model.config.input).tiles)
    return await asyncio.to_thread(model.engine.infer, tiles, lambda: None)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def engine_of(model: ServedModel) -> Controlled:
    engine = model.engine.current
    assert isinstance(engine, Controlled)
    return engine


def graph_of(model_repo: Path) -> Path:
    return model_repo / "blobs" / "1" / "model.onnx"


class TestDeadEngines:
    async def test_a_dead_engine_is_built_again_from_its_own_version(
        self, settings: Settings, model_repo: Path
    ) -> None:
        add_version(model_repo / "blobs", 2)
        edit(model_repo / "blobs", lambda content: content.update(serve={"policy": "all"}))
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
        monkeypatch.setattr(store_module, "LONGEST_PAUSE_S", 0.02)
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
            monkeypatch.setattr(store, "replace", None)  # not called
            store._report_death(model)
            await asyncio.sleep(0.05)
            assert not model.builds

    async def test_an_engine_that_is_built_for_nobody_is_closed(self, settings: Settings) -> None:
        built: list[Controlled] = []
        async with open_store(settings) as store:
            model = store.find("blobs", None)

            def build() -> dict[int, LoadedModel]:
                built.append(Controlled(None))
                return {1: replace(model.loaded, backend=built[-1])}

            await store.unload("blobs")
            await wait_for_retirement(store)
            await store.replace("blobs", build, only=model)
            assert built[0].closed and "blobs" not in store.served
            task = asyncio.create_task(store.replace("blobs", build, only=model))
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
            await until(lambda: store.failure is not None)
            with pytest.raises(BackendError, match="closed"):  # what waited is answered
                await call
            with pytest.raises(EngineRestarting):
                store.find("blobs", None)
            assert len(await infer(store.find("wide", None))) > 0
        assert caplog.text.count("no new engine yet") == 2
        reason = "the engine of model 'blobs' has failed: 3 attempts to replace it failed: "
        assert str(store.failure).startswith(reason)
        assert ("CUDA error 700" in str(store.failure)) is (kind != "fallback")
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
            assert store.failure is None and not call.done()
            config.write_bytes(content)
            (model_repo / "away").rename(graph_of(model_repo))
            assert len(await call) == 1
            assert store.failure is None

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
            assert failures == [6] and store.failure is None

    async def test_an_attempt_that_hangs_is_the_last(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(store_module, "REBUILD_S", 0.05)
        go = threading.Event()

        def hang(self: Repository, model: LoadedModel) -> LoadedModel:
            assert go.wait(20)
            raise BackendError("too late")

        monkeypatch.setattr(Repository, "rebuild", hang)
        async with open_store(settings) as store:
            engine_of(store.find("blobs", None)).dead = True
            with pytest.raises(BackendError, match="closed"):
                await infer(store.find("blobs", None))
            assert str(store.failure).endswith("an attempt to replace it hangs for 0.05 s")
            go.set()


class TestVersions:
    async def test_two_loads_at_once_build_one_after_the_other(
        self, settings: Settings, model_repo: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        async with open_store(settings) as store:
            add_version(model_repo / "blobs", 2)
            both = await asyncio.gather(store.load("blobs"), store.load("blobs"))
            assert list(both) == [[2], [2]]
            await wait_for_retirement(store)
        assert caplog.text.count("model blobs version 1 has ended") == 1

    async def test_an_engine_that_is_replaced_during_a_load_goes_on(
        self, settings: Settings, model_repo: Path, monkeypatch: pytest.MonkeyPatch
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

    async def test_a_load_does_not_build_an_engine_twice(self, settings: Settings) -> None:
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
        self, settings: Settings, model_repo: Path
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
        self, settings: Settings, model_repo: Path, monkeypatch: pytest.MonkeyPatch
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
            edit(model_repo / "blobs", lambda content: content.update(serve=wanted))
            with pytest.raises(ModelUnavailable, match=r"blobs/3/model\.onnx"):
                await store.load("blobs")
            assert [engine.closed for engine in built] == [True]
            assert sorted(store.served["blobs"]) == [1]


class TestPoll:
    @pytest.mark.parametrize("when", ["loading", "unloading"])
    async def test_it_survives_any_failure(
        self,
        settings: Settings,
        model_repo: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        when: str,
    ) -> None:
        failed = threading.Event()

        async with open_store(settings) as store:
            load, unload = store.load, store.unload

            async def fail_to_load(name: str) -> list[int]:
                if name == "blobs" and not failed.is_set():
                    failed.set()
                    raise OSError("stale file handle")
                return await load(name)

            async def unload_after_someone_else(name: str) -> None:
                await unload(name)
                failed.set()
                await unload(name)

            if when == "loading":
                monkeypatch.setattr(store, "load", fail_to_load)
            else:
                monkeypatch.setattr(store, "unload", unload_after_someone_else)
            poll = asyncio.create_task(store.poll(0.01))
            await asyncio.sleep(0.05)
            if when == "unloading":
                await until(lambda: "wide" in store.served)
                (model_repo / "wide" / "config.json").unlink()
            await until(failed.is_set)
            publish(model_repo, "late")
            await until(lambda: "late" in store.served or poll.done())
            assert not poll.done() and "late" in store.served
            poll.cancel()
        assert ("stale file handle" in caplog.text) is (when == "loading")


def test_a_repository_is_closed_with_its_engines(settings: Settings) -> None:
    engine = Controlled(None)
    loaded = load_repository(settings.model_repo, OPTIONS)
    model = replace(loaded.models["blobs"][1], backend=engine)
    Repository(loaded.root, {"blobs": {1: model}}, {}).close()
    assert engine.closed
