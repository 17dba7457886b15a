"""Publishing that is stopped at any step leaves the old or the new state, whole."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from service.engines.base import BackendOptions
from service.errors import ModelRefused
from service.files import locked
from service.models.folders import find_artefacts, read_default
from service.models.publishing import (
    edit_config,
    format_json,
    recover,
    write_default,
    write_version,
)
from service.models.repository import load_version, read_config
from tests.support.blob_model import build_graph, model_config, publish

OPTIONS = BackendOptions(device="cpu", threads=1)
OLD, NEW = build_graph(), build_graph(poisonable=True)
NOTES = ("a.txt", "b.txt", "y.txt", "z.txt")
"""Files of a version that config.json does not list."""
STEPS = (
    *("replace", "rename", "mkdir", "link", "unlink", "remove", "rmdir", "fsync", "open"),
    *("chmod", "symlink"),
)


class Killed(BaseException):
    """The process has been killed: nothing after it is done."""


@contextmanager
def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Lets the first calls of `os` that change files pass; the others raise, as all later ones.

    Gives the names of the calls.
    """
    calls: list[str] = []

    def patch(name: str) -> None:
        original: Callable[..., Any] = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) >= step:
                raise Killed
            return original(*arguments, **options)

        patched.setattr(os, name, call)

    with monkeypatch.context() as patched:
        for name in STEPS:
            patch(name)
        yield calls


def write(folder: Path, version: int, graph: bytes, *, keep: bool = False) -> None:
    """Publishes a version as `solo-export` does."""
    folder.parent.mkdir(exist_ok=True)
    with locked(folder.parent):
        recover(folder)
        config = folder / "config.json"
        content = json.loads(config.read_bytes()) if config.exists() else None
        new = model_config(graph, folder.name, version)
        if content is not None:
            new["versions"] = {**content["versions"], **new["versions"]}
        files = {"model.onnx": graph, "parity.json": b"{}"}
        write_version(folder, version, files, format_json(new), keep=keep)


def digest_of(folder: Path, version: int) -> str:
    """The SHA-256 of a version's graph, which is loaded and run."""
    model = load_version(folder, version, OPTIONS)
    model.backend.close()
    return model.config.files["model.onnx"].sha256


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_folder_of_the_version_is_complete_before_it_can_be_served(tmp_path: Path) -> None:
    """What is linked from the old version would pass for it before the rest is there."""
    folder = publish(tmp_path)
    (folder / "1" / "weights.pt").write_bytes(b"unlisted")
    (folder / ".1.part").mkdir()
    os.link(folder / "1" / "model.onnx", folder / ".1.part" / "model.onnx")
    assert find_artefacts(folder, read_config(folder)).folder == folder / "1"
    recover(folder)
    assert list_files(folder) == ["1/model.onnx", "1/weights.pt", "config.json"]


def list_files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_a_version_that_is_replaced_is_the_old_or_the_new_one_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    for step in range(1, 200):
        folder = tmp_path / str(step) / "blobs"
        write(folder, 1, OLD)
        for name in NOTES:
            (folder / "1" / name).write_text("kept")
        with killed_at(step, monkeypatch) as calls:
            try:
                write(folder, 1, NEW, keep=True)
            except Killed:
                is_done = False
            else:
                is_done = True
        found = digest_of(folder, 1)
        served = find_artefacts(folder, read_config(folder, 1)).folder
        assert {*NOTES} <= {path.name for path in served.iterdir()}, (step, calls)
        assert found in {sha256(OLD), sha256(NEW)}, (step, calls)
        seen.add((found == sha256(NEW), is_done))
        write(folder, 1, NEW, keep=True)
        assert digest_of(folder, 1) == sha256(NEW), (step, calls)
        wanted = {f"1/{name}" for name in ("model.onnx", "parity.json", *NOTES)} | {"config.json"}
        assert set(list_files(folder)) == wanted, (step, calls)
        if is_done:
            break
    assert is_done and step > 10
    assert seen == {(False, False), (True, False), (True, True)}


@pytest.mark.parametrize("is_first", [True, False])
def test_a_version_that_is_added_is_there_or_not_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    version = 1 if is_first else 2
    seen = set()
    for step in range(1, 200):
        folder = tmp_path / str(step) / "blobs"
        folder.parent.mkdir()
        if not is_first:
            write(folder, 1, OLD)
        with killed_at(step, monkeypatch) as calls:
            try:
                write(folder, version, NEW)
            except Killed:
                is_done = False
            else:
                is_done = True
        try:
            assert digest_of(folder, version) == sha256(NEW), (step, calls)
            is_there = True
        except ModelRefused:
            is_there = False
            assert is_first is not folder.exists(), (step, calls)
        if not is_first:
            assert digest_of(folder, 1) == sha256(OLD), (step, calls)
        seen.add((is_there, is_done))
        write(folder, version, NEW)
        assert digest_of(folder, version) == sha256(NEW), (step, calls)
        assert not list(folder.parent.rglob(".*")), (step, calls)
        if is_done:
            break
    assert is_done and step > 5
    assert seen == {(False, False), (True, False), (True, True)}


def publish_for_ever(folder: Path) -> None:
    while True:
        for graph in (NEW, OLD):
            write(folder, 1, graph)


def test_a_publisher_that_is_killed_again_and_again_leaves_a_whole_version(tmp_path: Path) -> None:
    folder = tmp_path / "blobs"
    write(folder, 1, OLD)
    moments = random.Random(3)
    for _ in range(4):
        process = multiprocessing.get_context("spawn").Process(
            target=publish_for_ever, args=(folder,)
        )
        before = (folder / "config.json").stat().st_ino
        process.start()
        deadline_s = time.monotonic() + 60
        while (folder / "config.json").stat().st_ino == before:
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        assert digest_of(folder, 1) in {sha256(OLD), sha256(NEW)}
    write(folder, 1, NEW)
    assert digest_of(folder, 1) == sha256(NEW)
    assert list_files(tmp_path) == [
        "blobs/1/model.onnx",
        "blobs/1/parity.json",
        "blobs/config.json",
    ]


@pytest.mark.parametrize("failing", ["model.onnx", "config.json", "1"])
def test_a_full_disk_leaves_the_old_or_the_new_state_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    folder = tmp_path / "blobs"
    write(folder, 1, OLD)
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if Path(target).name == failing and Path(source).name != ".1.prev":
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(os, "replace", fail)
        write(folder, 1, NEW)
    assert digest_of(folder, 1) == sha256(NEW if failing == "1" else OLD)
    if failing != "1":
        assert list_files(folder) == ["1/model.onnx", "1/parity.json", "config.json"]
    write(folder, 1, NEW)
    assert list_files(folder) == ["1/model.onnx", "1/parity.json", "config.json"]


def test_a_staged_version_that_config_json_does_not_list_is_not_served_and_is_removed(
    tmp_path: Path,
) -> None:
    folder = publish(tmp_path)
    staged = folder / ".1.next"
    (folder / ".1.part").mkdir()
    staged.mkdir()
    (staged / "model.onnx").write_bytes(NEW)
    config = read_config(folder)
    assert find_artefacts(folder, config).folder == folder / "1"
    (staged / "model.onnx").write_bytes(OLD)
    assert find_artefacts(folder, config).folder == staged
    (staged / "model.onnx").write_bytes(NEW)
    recover(folder)
    assert not list(folder.glob(".*"))
    assert digest_of(folder, 1) == sha256(OLD)


def test_files_are_not_changed_through_links_to_the_old_version(tmp_path: Path) -> None:
    folder = tmp_path / "blobs"
    write(folder, 1, OLD)
    other = tmp_path / "hard_link"
    os.link(folder / "1" / "model.onnx", other)
    write(folder, 1, NEW, keep=True)
    assert other.read_bytes() == OLD


def test_a_version_that_is_a_link_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    folder, elsewhere = publish(tmp_path / "repo"), tmp_path / "elsewhere"
    (folder / "1").rename(elsewhere)
    (folder / "1").symlink_to(elsewhere)
    write(folder, 1, NEW)
    assert digest_of(folder, 1) == sha256(NEW)
    assert (elsewhere / "model.onnx").read_bytes() == OLD


def test_json_is_readable_text(tmp_path: Path) -> None:
    assert format_json({"a": "\u00e9"}) == '{\n  "a": "\u00e9"\n}\n'.encode()


def test_one_process_changes_a_repository_at_a_time(tmp_path: Path) -> None:
    import fcntl

    with locked(tmp_path):
        descriptor = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
    with locked(tmp_path):
        pass


def test_a_change_removes_what_an_interrupted_publication_has_left(tmp_path: Path) -> None:
    folder = publish(tmp_path)
    staged = folder / ".9.next"
    staged.mkdir()
    edit_config(folder, lambda content, _: content.update(description="new"))
    assert not staged.exists()
    assert read_config(folder, 1).description == "new"


def test_a_change_that_would_break_config_json_is_refused(tmp_path: Path) -> None:
    folder = publish(tmp_path)
    before = (folder / "config.json").read_bytes()

    def pin(content: dict[str, Any], _: object) -> None:
        content["serve"] = {"policy": "specific", "versions": [7]}

    with pytest.raises(ModelRefused, match=r"served in \[7\], but has only \[1\]"):
        edit_config(folder, pin)
    assert (folder / "config.json").read_bytes() == before


def test_the_default_is_written_and_cleared(tmp_path: Path) -> None:
    assert read_default(tmp_path) is None
    write_default(tmp_path, "blobs")
    assert read_default(tmp_path) == "blobs"
    write_default(tmp_path, None)
    assert read_default(tmp_path) is None
