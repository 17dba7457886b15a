from __future__ import annotations

import errno
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.canvases import Bucket, list_canvases
from pipeline.model_config import ModelConfig
from pipeline.repository_config import parse_model_config
from service.engines.base import BackendError
from service.engines.tensorrt.build import (
    build_plan,
    choose_options,
    find_obstacle,
    obtain_engine,
    read_environment,
)
from service.engines.tensorrt.cache import BuildOptions, EngineCache
from service.engines.tensorrt.log import PhaseProgress
from tests.support.blob_model import KEEP_RATIO_INPUT, build_graph, model_config
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_tensorrt import FakeTensorrt, build_error

BUCKETS = (Bucket((32, 64), (64, 64), (64, 128)), Bucket((64, 32), (64, 64), (128, 64)))
OPTIONS = BuildOptions(buckets=BUCKETS, max_batch=8, opt_batch=4)


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


def build_config(**changes: object) -> ModelConfig:
    content = {**model_config(build_graph()), **changes}
    return parse_model_config(json.dumps(content)).for_version(1)


def test_each_bucket_gets_a_profile(fake_tensorrt: FakeTensorrt, tmp_path: Path) -> None:
    build_plan(b"graph", OPTIONS, tmp_path / "t.timing")
    (config,) = fake_tensorrt.configs
    assert [profile.shapes for profile in config.profiles] == [
        {
            "images": ((1, *b.min_hw, 3), (4, *b.opt_hw, 3), (8, *b.max_hw, 3)),
            "valid_hw": ((1, 2), (4, 2), (8, 2)),
        }
        for b in BUCKETS
    ]


@pytest.mark.parametrize(("version", "flags"), [("10.1.0", 1), ("10.16.1.11", 1), ("11.4.0", 0)])
def test_the_network_is_strongly_typed(
    install_tensorrt: Callable[[str], FakeTensorrt], version: str, flags: int, tmp_path: Path
) -> None:
    fake = install_tensorrt(version)
    build_plan(b"graph", OPTIONS, tmp_path / "t.timing")
    assert fake.flags == [flags]


def test_the_options_reach_the_builder(fake_tensorrt: FakeTensorrt, tmp_path: Path) -> None:
    build_plan(b"graph", OPTIONS, tmp_path / "t.timing")
    changes = {
        "optimization_level": 5,
        "workspace_bytes": 1 << 30,
        "hardware_compatibility": "ampere_plus",
        "tf32": True,
    }
    build_plan(b"graph", OPTIONS.model_copy(update=changes), tmp_path / "t.timing")
    plain, changed = fake_tensorrt.configs
    assert (plain.builder_optimization_level, plain.limits, plain.cleared) == (3, {}, ["tf32"])
    assert plain.hardware_compatibility_level is None
    assert (changed.builder_optimization_level, changed.cleared) == (5, [])
    assert changed.limits == {"workspace": 1 << 30}
    assert changed.hardware_compatibility_level == "ampere"


def test_a_level_that_the_version_does_not_have_is_refused(
    install_tensorrt: Callable[[str], FakeTensorrt], tmp_path: Path
) -> None:
    options = OPTIONS.model_copy(update={"hardware_compatibility": "same_compute_capability"})
    install_tensorrt("10.8.0.43")
    with pytest.raises(BackendError, match=r"needs TensorRT 10\.9, this is 10\.8\.0\.43"):
        build_plan(b"graph", options, tmp_path / "t.timing")
    fake = install_tensorrt("10.9.0.34")
    build_plan(b"graph", options, tmp_path / "t.timing")
    assert fake.configs[0].hardware_compatibility_level == "same"


def test_the_parsers_errors_name_their_nodes(fake_tensorrt: FakeTensorrt, tmp_path: Path) -> None:
    fake_tensorrt.errors = [
        build_error("head/deform", "DeformConv", "no importer"),
        build_error("", "NonZero", "data-dependent", number=17),
    ]
    with pytest.raises(BackendError) as caught:
        build_plan(b"graph", OPTIONS, tmp_path / "t.timing")
    assert str(caught.value) == (
        "TensorRT cannot read the graph: node head/deform (DeformConv): no importer; "
        "node number 17 (NonZero): data-dependent"
    )


def test_a_failed_build_says_what_tensorrt_logged(
    fake_tensorrt: FakeTensorrt, tmp_path: Path
) -> None:
    fake_tensorrt.fails_with = "no tactic for /neck/Conv within the workspace"
    with pytest.raises(BackendError, match="cannot build the engine: no tactic for /neck/Conv"):
        build_plan(b"graph", OPTIONS, tmp_path / "t.timing")


def test_a_refused_profile_is_named(fake_tensorrt: FakeTensorrt, tmp_path: Path) -> None:
    fake_tensorrt.refuses_profiles = True
    with pytest.raises(BackendError, match=r"profile of images \[\(1, 32, 64, 3\)"):
        build_plan(b"graph", OPTIONS, tmp_path / "t.timing")


def test_another_graph_than_the_contracts_is_refused(
    fake_tensorrt: FakeTensorrt, tmp_path: Path
) -> None:
    fake_tensorrt.outputs = ["scores", "boxes", "mask_probs"]
    with pytest.raises(BackendError, match="boxes"):
        build_plan(b"graph", OPTIONS, tmp_path / "t.timing")


def test_timings_are_loaded_merged_and_saved(fake_tensorrt: FakeTensorrt, tmp_path: Path) -> None:
    file = tmp_path / "t.timing"
    build_plan(b"graph", OPTIONS, file)
    assert json.loads(file.read_bytes()) == ["kernel 1"]

    def another_process_saves(status: str, progress: float) -> None:
        if status.startswith("building") and progress == 0.5:
            file.write_text('["kernel 1", "theirs"]')

    build_plan(b"graph", OPTIONS, file, another_process_saves)
    assert json.loads(file.read_bytes()) == ["kernel 1", "kernel 2", "theirs"]


@pytest.mark.parametrize("content", [b"not timings", b'["other GPU"]'])
def test_timings_that_do_not_fit_start_afresh(
    content: bytes, fake_tensorrt: FakeTensorrt, tmp_path: Path
) -> None:
    file = tmp_path / "t.timing"
    file.write_bytes(content)
    build_plan(b"graph", OPTIONS, file)
    assert "kernel 1" in json.loads(file.read_bytes())


def test_timings_that_cannot_be_saved_cost_no_engine(
    fake_tensorrt: FakeTensorrt, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert build_plan(b"graph", OPTIONS, tmp_path / "file" / "t.timing")
    assert "is not written" in caplog.text


def test_an_engine_is_built_once(fake_tensorrt: FakeTensorrt, cache: EngineCache) -> None:
    first = obtain_engine(b"graph", OPTIONS, cache)
    assert first.stored
    assert first.origin.startswith(f"engine {first.key.digest} built in ")
    second = obtain_engine(b"graph", OPTIONS, cache)
    assert second.plan == first.plan
    assert second.origin == f"engine {first.key.digest} from the cache"
    assert fake_tensorrt.builds == 1


def test_another_version_builds_its_own(
    install_tensorrt: Callable[[str], FakeTensorrt], cache: EngineCache
) -> None:
    for version in ("10.16.1.11", "11.4.0.106"):
        fake = install_tensorrt(version)
        obtain_engine(b"graph", OPTIONS, cache)
        assert fake.builds == 1


def test_a_damaged_engine_is_built_again(fake_tensorrt: FakeTensorrt, cache: EngineCache) -> None:
    engine = obtain_engine(b"graph", OPTIONS, cache)
    cache.engine_file(engine.key).write_bytes(b"damaged")
    assert obtain_engine(b"graph", OPTIONS, cache).plan == engine.plan
    assert fake_tensorrt.builds == 2


def test_a_full_disk_costs_only_the_next_start(
    fake_tensorrt: FakeTensorrt, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    engine = obtain_engine(b"graph", OPTIONS, cache)
    assert engine.plan
    assert not engine.stored
    assert engine.origin.endswith("No space left on device")
    assert str(cache.folder) in engine.origin
    assert list(cache.folder.iterdir()) == []


def test_progress_counts_the_steps_within_steps() -> None:
    reported: list[tuple[str, float]] = []
    progress = PhaseProgress(lambda *report: reported.append(report))
    progress.start("build", None, 4)
    progress.step("build", 0)
    progress.start("tactics", "build", 2)
    progress.step("tactics", 0)
    progress.finish("tactics")
    progress.step("build", 3)
    progress.finish("build")
    progress.start("again", None, 10)
    progress.step("again", 0)
    progress.step("unknown", 1)
    assert [share for _, share in reported] == [0.25, 0.375, 1.0, 1.0]
    assert reported[1][0] == "building the engine: tactics"


def test_the_build_reports_from_beginning_to_end(
    fake_tensorrt: FakeTensorrt, cache: EngineCache
) -> None:
    shares: list[float] = []
    obtain_engine(b"graph", OPTIONS, cache, lambda status, progress: shares.append(progress))
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert 0.5 in shares


def test_a_models_options_cover_all_its_canvases() -> None:
    config = build_config(input=KEEP_RATIO_INPUT, limits={"max_batch": 6})
    options = choose_options(config, precision="fp16", optimization_level=1)
    assert (options.max_batch, options.opt_batch, options.precision) == (6, 6, "fp16")
    assert options.optimization_level == 1
    for canvas in list_canvases(config.input):
        assert any(bucket.holds(canvas) for bucket in options.buckets)


def test_the_environment_is_read(fake_tensorrt: FakeTensorrt) -> None:
    environment = read_environment()
    assert environment.model_dump() == {
        "tensorrt": "10.16.1.11",
        "cuda": "13.0",
        "sm": "sm_90",
        "gpu": "Fake GPU",
    }


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, fake_cuda: FakeCuda) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert find_obstacle() == "the package tensorrt is not installed (extra tensorrt)"


def test_an_old_version_is_refused(
    install_tensorrt: Callable[[str], FakeTensorrt], cache: EngineCache
) -> None:
    install_tensorrt("10.0.1")
    assert find_obstacle() == "TensorRT is 10.0.1, at least 10.1 is needed"
    with pytest.raises(BackendError, match=r"at least 10\.1"):
        obtain_engine(b"graph", OPTIONS, cache)
    install_tensorrt("10.1.0")
    assert find_obstacle() is None


def test_a_machine_without_a_gpu_says_so(
    fake_tensorrt: FakeTensorrt, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> tuple[int, int]:
        raise RuntimeError("no NVIDIA driver\nand more")

    monkeypatch.setattr(fake_cuda.module.system, "get_user_mode_driver_version", fail)
    assert find_obstacle() == "TensorRT cannot be used: no NVIDIA driver"
