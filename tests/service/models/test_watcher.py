"""Following the repository on disk while its models are served."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from service.errors import RepositoryUnreadable
from service.models import watcher as watcher_module
from service.models.folders import list_models
from service.models.publishing import write_default
from service.models.repository import load_repository
from service.models.store import ModelStore
from service.models.watcher import RepositoryWatcher
from service.observe.metrics import Metrics
from service.settings import Settings
from tests.service.conftest import OPTIONS
from tests.support.blob_model import build_graph, publish
from tests.support.metrics import render
from tests.support.model_folder import add_version, edit_config


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher_module, "GONE_S", 0.0)


class Watched:
    """A store with its watcher.

    Attributes:
        metrics: Theirs.
    """

    def __init__(self, settings: Settings) -> None:
        repository = load_repository(settings.model_repo, OPTIONS, may_be_empty=True)
        self.metrics = Metrics()
        self.store = ModelStore(settings, repository, self.metrics)
        self.watcher = RepositoryWatcher(self.store, repository.stamps, self.metrics)

    @property
    def served(self) -> dict[str, list[int]]:
        return {name: sorted(versions) for name, versions in self.store.served.items()}

    def default(self) -> str | None:
        return self.store.default_model

    def shows(self, sample: str) -> bool:
        return f"\n{sample}\n" in render(self.metrics)


@pytest.fixture
async def watched(settings: Settings) -> AsyncIterator[Watched]:
    changeable = settings.model_copy(update={"model_poll_s": 1.0, "default_model": None})
    found = Watched(changeable)
    found.store.start()
    yield found
    await found.store.close(finished=False)


async def test_a_check_without_changes_loads_nothing(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(name: str) -> list[int]:
        raise AssertionError(name)

    monkeypatch.setattr(watched.store, "load", fail)
    await watched.watcher.check()
    assert watched.served == {"blobs": [1], "wide": [1]}
    assert watched.shows("solo_repository_readable 1.0")


async def test_what_changes_appears_and_vanishes_is_followed(
    watched: Watched, model_repo: Path
) -> None:
    add_version(model_repo / "blobs", 2)
    publish(model_repo, "late")
    (model_repo / "wide" / "config.json").unlink()
    await watched.watcher.check()
    assert watched.served == {"blobs": [2], "late": [1]}
    shutil.rmtree(model_repo / "late")
    shutil.rmtree(model_repo / "broken")
    assert watched.shows('solo_model_refused{model="broken"} 1.0')
    await watched.watcher.check()
    assert watched.served == {"blobs": [2]}
    assert watched.store.unavailable == {}
    assert 'solo_model_refused{model="broken"}' not in render(watched.metrics)


def write_bytes(content: bytes) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        file.write_bytes(content)

    return write


def write_large(file: Path) -> None:
    with file.open("wb") as sparse:
        sparse.truncate(1 << 30)


def write_version_of_many_digits(file: Path) -> None:
    content = json.loads((file.parent.parent / "blobs" / "config.json").read_text())
    versions = {"9" * 5000: content["versions"]["1"]}
    file.write_text(json.dumps({**content, "versions": versions}))


def link_to_itself(file: Path) -> None:
    file.symlink_to(file)


BROKEN_CONFIGS: dict[str, tuple[Callable[[Path], None], str]] = {
    "nested": (write_bytes(b"[" * 200_000), "nested deeper than"),
    "version": (write_version_of_many_digits, "versions"),
    "empty": (write_bytes(b""), "not valid JSON"),
    "binary": (write_bytes(b"\xff\xfe\x00{"), "not valid JSON"),
    "surrogate": (write_bytes(b'{"name": "\\ud800"}'), "not Unicode"),
    "number": (write_bytes(b'{"name": 1e999}'), "not finite"),
    "large": (write_large, "1073741824 bytes, the limit is 1048576"),
    "fifo": (os.mkfifo, "a FIFO, not a regular file"),
    "folder": (Path.mkdir, "a folder, not a regular file"),
    "loop": (link_to_itself, "Too many levels"),
    "device": (lambda file: file.symlink_to("/dev/zero"), "a device, not a regular file"),
}


@pytest.mark.parametrize("name", BROKEN_CONFIGS)
async def test_a_broken_model_is_refused_alone_and_the_watching_goes_on(
    watched: Watched, model_repo: Path, name: str
) -> None:
    write, reason = BROKEN_CONFIGS[name]
    (model_repo / name).mkdir()
    write(model_repo / name / "config.json")
    await watched.watcher.check()
    assert reason in watched.store.unavailable[name]
    assert watched.shows(f'solo_model_refused{{model="{name}"}} 1.0')
    assert watched.shows("solo_repository_readable 1.0")
    publish(model_repo, "late")
    await watched.watcher.check()
    assert watched.served == {"blobs": [1], "wide": [1], "late": [1]}


@pytest.mark.parametrize("name", BROKEN_CONFIGS)
def test_a_broken_model_does_not_stop_the_start(model_repo: Path, name: str) -> None:
    write, reason = BROKEN_CONFIGS[name]
    (model_repo / name).mkdir()
    write(model_repo / name / "config.json")
    repository = load_repository(model_repo, OPTIONS)
    assert sorted(repository.models) == ["blobs", "wide"]
    assert reason in str(repository.refused[name])
    repository.close()


async def test_a_folder_whose_name_is_not_utf8_is_shown_escaped(
    watched: Watched, model_repo: Path
) -> None:
    folder = os.fsencode(model_repo) + b"/bad\xff\nname"
    os.mkdir(folder)
    with open(folder + b"/config.json", "wb") as file:
        file.write((model_repo / "blobs" / "config.json").read_bytes())
    await watched.watcher.check()
    (shown,) = set(watched.store.unavailable) - {"broken"}
    assert shown == "bad\\udcff\\nname"
    assert "names the model 'blobs'" in watched.store.unavailable[shown]
    assert "bad" in render(watched.metrics)
    publish(model_repo, "late")
    await watched.watcher.check()
    assert "late" in watched.served


async def test_a_refused_model_is_loaded_when_its_files_are_complete(
    watched: Watched, model_repo: Path
) -> None:
    """They may be copied after config.json."""
    (model_repo / "broken" / "1" / "model.onnx").write_bytes(build_graph())
    await watched.watcher.check()
    assert watched.served["broken"] == [1]


async def rename_away(watched: Watched, root: Path, aside: Path) -> None:
    root.rename(aside)


async def leave_an_empty_folder(watched: Watched, root: Path, aside: Path) -> None:
    root.rename(aside)
    root.mkdir()


@pytest.mark.parametrize("vanish", [rename_away, leave_an_empty_folder])
async def test_a_repository_that_is_away_leaves_what_is_loaded(
    watched: Watched,
    model_repo: Path,
    caplog: pytest.LogCaptureFixture,
    vanish: Callable[[Watched, Path, Path], Awaitable[None]],
) -> None:
    aside = model_repo.with_name("aside")
    kept = watched.store.find("blobs", 1)
    await vanish(watched, model_repo, aside)
    for _ in range(3):
        await watched.watcher.check()
    assert watched.served == {"blobs": [1], "wide": [1]}
    assert watched.shows("solo_repository_readable 0.0")
    assert caplog.text.count("ERROR") == 1  # once, not at every check
    if model_repo.exists():
        model_repo.rmdir()
    aside.rename(model_repo)
    add_version(model_repo / "wide", 2, graph=build_graph(poisonable=True))
    await watched.watcher.check()
    assert watched.shows("solo_repository_readable 1.0")
    assert watched.served == {"blobs": [1], "wide": [2]}
    assert watched.store.find("blobs", 1) is kept


async def test_a_model_folder_that_is_replaced_by_renaming_is_not_unloaded(
    watched: Watched, model_repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside = model_repo.with_name("aside")
    sleep = asyncio.sleep

    async def come_back(delay_s: float) -> None:
        if aside.exists():
            aside.rename(model_repo / "wide")
        await sleep(0)

    kept = watched.store.find("wide", 1)
    (model_repo / "wide").rename(aside)
    monkeypatch.setattr("service.models.watcher.asyncio.sleep", come_back)
    await watched.watcher.check()
    assert watched.store.find("wide", 1) is kept


@pytest.mark.parametrize("fails_first", [False, True])
async def test_a_model_that_vanishes_while_it_is_loaded_is_unloaded(
    watched: Watched,
    model_repo: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fails_first: bool,
) -> None:
    load = watched.store.load

    async def load_what_has_vanished(name: str) -> list[int]:
        shutil.rmtree(model_repo / name)
        if fails_first:
            raise RepositoryUnreadable("stale file handle")
        return await load(name)

    monkeypatch.setattr(watched.store, "load", load_what_has_vanished)
    add_version(model_repo / "wide", 2)
    await watched.watcher.check()
    await watched.watcher.check()
    assert watched.served == {"blobs": [1]}
    assert "ERROR" not in caplog.text


@pytest.mark.parametrize("error", [RuntimeError("odd"), OSError("stale file handle")])
async def test_polling_survives_any_failure(
    watched: Watched,
    model_repo: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    failures: list[Any] = []
    load = watched.store.load

    async def fail_once(name: str) -> list[int]:
        if not failures:
            failures.append(name)
            raise error
        return await load(name)

    def fail_to_list(root: Path) -> list[Path]:
        if len(failures) == 1:
            failures.append(root)
            raise error
        return list_models(root)

    monkeypatch.setattr(watched.store, "load", fail_once)
    monkeypatch.setattr(watcher_module, "list_models", fail_to_list)
    poll = asyncio.create_task(watched.watcher.poll(0.01))
    publish(model_repo, "first")
    async with asyncio.timeout(20):
        while len(failures) < 2:
            await asyncio.sleep(0.01)
        publish(model_repo, "second")
        while not {"first", "second"} <= set(watched.store.served):
            await asyncio.sleep(0.01)
    assert not poll.done()
    assert str(error) in caplog.text
    poll.cancel()


async def test_the_default_of_the_repository_is_followed(
    watched: Watched, model_repo: Path
) -> None:
    assert watched.default() is None
    write_default(model_repo, "wide")
    await watched.watcher.check()
    assert watched.default() == "wide"
    assert watched.store.find(None, None).name == "wide"
    (model_repo / "repository.json").write_text('{"default_model": 7}')
    await watched.watcher.check()
    assert watched.default() == "wide"
    assert watched.shows("solo_repository_readable 0.0")
    write_default(model_repo, None)
    await watched.watcher.check()
    assert watched.default() is None
    assert watched.shows("solo_repository_readable 1.0")


async def test_a_store_without_models_is_filled(settings: Settings, tmp_path: Path) -> None:
    root = tmp_path / "empty"
    root.mkdir()
    empty = settings.model_copy(
        update={"model_repo": root, "model_poll_s": 1.0, "default_model": None}
    )
    watched = Watched(empty)
    watched.store.start()
    await watched.watcher.check()
    assert watched.served == {}
    publish(root, "first")
    await watched.watcher.check()
    assert watched.store.find(None, None).name == "first"
    edit_config(root / "first", lambda content: content.update(description="changed"))
    await watched.watcher.check()
    assert watched.store.find(None, None).config.description == "changed"
    await watched.store.close(finished=False)
