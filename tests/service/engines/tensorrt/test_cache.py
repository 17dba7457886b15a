from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.canvases import Bucket
from service.engines.tensorrt.cache import (
    BuildOptions,
    EngineCache,
    EngineKey,
    Environment,
    build_key,
    choose_cache,
)

ENVIRONMENT = Environment(tensorrt="10.16.1.11", cuda="13.0", sm="sm_90", gpu="NVIDIA H200")
OPTIONS = BuildOptions(buckets=(Bucket((64, 64), (64, 96), (96, 96)),))
KEY = build_key(b"graph", OPTIONS, ENVIRONMENT)
PLAN = b"plan" * 1000


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


def test_a_stored_engine_is_found(cache: EngineCache) -> None:
    assert cache.load(KEY) is None
    file = cache.store(KEY, PLAN, 12.34)
    assert cache.load(KEY) == PLAN
    record = json.loads(file.with_suffix(".json").read_text())
    assert record["key"]["environment"] == ENVIRONMENT.model_dump()
    assert (record["plan_bytes"], record["build_s"]) == (len(PLAN), 12.3)
    assert sorted(path.suffix for path in cache.folder.iterdir()) == [".engine", ".json"]


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("environment", {"tensorrt": "11.4.0.106"}),
        ("environment", {"cuda": "13.1"}),
        ("environment", {"sm": "sm_100"}),
        ("environment", {"gpu": "NVIDIA H100"}),
        ("options", {"precision": "fp16"}),
        ("options", {"buckets": (Bucket((64, 64), (64, 96), (96, 128)),)}),
        ("options", {"buckets": (Bucket((64, 64), (96, 96), (96, 96)),)}),
        ("options", {"max_batch": 16}),
        ("options", {"opt_batch": 4}),
        ("options", {"optimization_level": 5}),
        ("options", {"workspace_bytes": 1 << 30}),
        ("options", {"hardware_compatibility": "ampere_plus"}),
        ("options", {"tf32": True}),
    ],
)
def test_everything_that_matters_changes_the_key(
    part: str, change: dict[str, Any], cache: EngineCache
) -> None:
    cache.store(KEY, PLAN, 1.0)
    environment = ENVIRONMENT.model_copy(update=change if part == "environment" else {})
    options = OPTIONS.model_copy(update=change if part == "options" else {})
    other = build_key(b"graph", options, environment)
    assert other.digest != KEY.digest
    assert cache.load(other) is None


def test_the_list_above_is_whole() -> None:
    """A new field must be looked at: does it change the engine?"""
    assert set(Environment.model_fields) == {"tensorrt", "cuda", "sm", "gpu"}
    assert set(EngineKey.model_fields) == {
        *("onnx_sha256", "environment", "options", "builder_version")
    }
    assert set(BuildOptions.model_fields) == {
        *("precision", "buckets", "max_batch", "opt_batch", "optimization_level"),
        *("workspace_bytes", "hardware_compatibility", "tf32"),
    }


def test_another_graph_or_builder_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_key(b"graph", OPTIONS, ENVIRONMENT) == KEY
    assert build_key(b"graph2", OPTIONS, ENVIRONMENT).digest != KEY.digest
    assert KEY.model_copy(update={"builder_version": 2}).digest != KEY.digest


def test_a_compatible_engine_is_shared_by_the_gpus_it_runs_on() -> None:
    other = ENVIRONMENT.model_copy(update={"gpu": "NVIDIA H100"})
    older = ENVIRONMENT.model_copy(update={"gpu": "NVIDIA A10", "sm": "sm_86"})

    def digest(level: str, environment: Environment) -> str:
        options = OPTIONS.model_copy(update={"hardware_compatibility": level})
        return build_key(b"graph", options, environment).digest

    same = "same_compute_capability"
    assert digest("none", ENVIRONMENT) != digest("none", other)
    assert digest(same, ENVIRONMENT) == digest(same, other)
    assert digest(same, ENVIRONMENT) != digest(same, older)
    assert digest("ampere_plus", ENVIRONMENT) == digest("ampere_plus", older)


@pytest.mark.parametrize(
    "damage",
    [
        lambda engine, record: engine.write_bytes(PLAN[:-1]),
        lambda engine, record: engine.write_bytes(PLAN[:-1] + b"!"),
        lambda engine, record: engine.write_bytes(b""),
        lambda engine, record: engine.unlink(),
        lambda engine, record: record.unlink(),
        lambda engine, record: record.write_text("{"),
        lambda engine, record: record.write_text("{}"),
        lambda engine, record: record.write_bytes(b"\xff\xfe"),
        lambda engine, record: (engine.unlink(), engine.mkdir()),
    ],
)
def test_a_damaged_engine_is_no_engine_and_is_replaced(damage: Any, cache: EngineCache) -> None:
    file = cache.store(KEY, PLAN, 1.0)
    damage(file, file.with_suffix(".json"))
    assert cache.load(KEY) is None
    if file.is_dir():
        file.rmdir()
    cache.store(KEY, PLAN, 1.0)
    assert cache.load(KEY) == PLAN


def test_an_engine_under_a_foreign_name_is_refused(
    cache: EngineCache, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody copied the files of another machine's engine."""
    other = build_key(b"graph", OPTIONS, ENVIRONMENT.model_copy(update={"sm": "sm_80"}))
    file = cache.store(other, PLAN, 1.0)
    for suffix in (".engine", ".json"):
        file.with_suffix(suffix).rename(cache.engine_file(KEY).with_suffix(suffix))
    assert cache.load(KEY) is None
    assert "names another key" in caplog.text


def test_what_tensorrt_refuses_can_be_forgotten(cache: EngineCache) -> None:
    cache.store(KEY, PLAN, 1.0)
    cache.forget(KEY)
    cache.forget(KEY)
    assert list(cache.folder.iterdir()) == []


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_full_disk_leaves_nothing_behind(
    failing: int, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine and its folder are synced, then its record and the folder again."""
    writes = 0

    def fsync(handle: int) -> None:
        nonlocal writes
        writes += 1
        if writes == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        cache.store(KEY, PLAN, 1.0)
    assert list(cache.folder.iterdir()) == []
    cache.store(KEY, PLAN, 1.0)
    assert cache.load(KEY) == PLAN


def test_timings_are_kept_by_version_and_gpu(cache: EngineCache) -> None:
    names = {cache.timing_file(ENVIRONMENT).name}
    for change in ({"tensorrt": "11.4.0.106"}, {"sm": "sm_80"}, {"gpu": "NVIDIA/H 100"}):
        names.add(cache.timing_file(ENVIRONMENT.model_copy(update=change)).name)
    assert len(names) == 4
    assert "10.16.1.11-sm_90-NVIDIA-H200.timing" in names
    assert all("/" not in name for name in names)


def test_the_folder_is_the_versions_or_what_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = tmp_path / "model" / "1"
    version.mkdir(parents=True)
    assert choose_cache(version, tmp_path / "wanted").folder == tmp_path / "wanted"
    assert choose_cache(version).folder == version / "engines"
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != version and access(path, mode))
    assert choose_cache(version).folder == home / "solo-serve"


@pytest.mark.parametrize(
    "change",
    [{"buckets": ()}, {"max_batch": 0}, {"optimization_level": 6}, {"precision": "fp64"}, {"x": 1}],
)
def test_wrong_options_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        BuildOptions.model_validate({**OPTIONS.model_dump(), **change})
