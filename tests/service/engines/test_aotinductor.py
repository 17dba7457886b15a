"""The AOTInductor backend; what compiles a package takes minutes and is marked slow."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from export.onnx_graph import build_onnx
from export.parity import match_candidates
from export.to_aoti import AotiOptions, build_aoti
from pipeline.model_config import FileSpec, ModelConfig
from pipeline.postprocess import postprocess
from pipeline.types import Candidates, Prepared, Tile
from service.engines import aotinductor as aoti
from service.engines.aoti_package import PackageInfo
from service.engines.aotinductor import build_aoti_backend, check_canvases, find_obstacle
from service.engines.base import BackendError, BackendOptions
from service.engines.onnxruntime import build_ort_backend
from tests.service.engines.test_aoti_package import build_archive
from tests.support.aoti import (
    CONFIG,
    CPU,
    INFO,
    build_tiles,
    eager_backend,
    serve,
    served_config,
)
from tests.support.tiny_solo import tiny_network


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 64, 64), (3, 96, 64), (2, 32, 160)])
def test_each_canvas_gets_its_candidates(batch: int, height: int, width: int) -> None:
    network = tiny_network(CONFIG)
    tiles = build_tiles(batch, height, width)
    found = eager_backend(network).infer(tiles)
    for tile, candidates in zip(tiles, found, strict=True):
        with torch.no_grad():
            scores, _, masks = network.candidates(
                torch.from_numpy(tile.image[None]), torch.tensor([tile.valid_hw])
            )
        assert isinstance(candidates, Candidates)
        used = scores[0] > 0
        np.testing.assert_array_equal(candidates.scores, scores[0][used].numpy())
        np.testing.assert_array_equal(candidates.mask_probs, masks[0][used].numpy())


def test_a_batch_that_is_too_large_is_cut() -> None:
    tiles = build_tiles(8, 64, 64)
    backend = eager_backend(tiny_network(CONFIG))
    alone = [backend.infer([tile])[0] for tile in tiles]
    for one, other in zip(backend.infer(tiles), alone, strict=True):
        np.testing.assert_array_equal(one.scores, other.scores)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 64, 64), "4 canvases, the package takes 1 to 3"),
        ((0, 64, 64), "0 canvases"),
        ((1, 192, 64), r"canvas of \(192, 64\).*up to \(160, 160\)"),
        ((1, 64, 72), r"canvas of \(64, 72\)"),
    ],
)
def test_canvases_that_the_package_is_not_for_are_refused(
    shape: tuple[int, int, int], message: str
) -> None:
    check_canvases(INFO, 3, (160, 160))
    with pytest.raises(BackendError, match=message):
        check_canvases(INFO, shape[0], shape[1:])


def test_another_canvas_than_the_fixed_one_is_refused() -> None:
    info = replace(INFO, fixed_canvas=True, max_canvas_hw=(64, 64))

    def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        raise AssertionError("its code has run")

    with pytest.raises(BackendError, match=r"is for \(64, 64\)"):
        serve(run, info).infer(build_tiles(1, 32, 64))


def test_what_torch_raises_is_an_error_of_the_backend_and_the_slot_comes_back() -> None:
    def fail(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        raise RuntimeError("out of memory")

    backend = serve(fail)
    for _ in range(2):
        with pytest.raises(BackendError, match=r"aotinductor failed on images.*: out of memory"):
            backend.infer(build_tiles(1, 64, 64))


def test_masks_of_half_precision_come_as_float32() -> None:
    def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        batch = len(inputs[0])
        masks = torch.full((batch, 2, 16, 16), 0.75, dtype=torch.bfloat16)
        return torch.full((batch, 2), 0.5), torch.zeros(batch, 2, dtype=torch.int64), masks

    (candidates,) = serve(run).infer(build_tiles(1, 64, 64))
    assert isinstance(candidates, Candidates)
    assert candidates.mask_probs.dtype == np.float32 and (candidates.mask_probs == 0.75).all()


def test_a_closed_engine_says_so() -> None:
    backend = eager_backend(tiny_network(CONFIG))
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.infer(build_tiles(1, 64, 64))


def test_obstacles(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_obstacle(CPU) is None
    assert "int8" in str(find_obstacle(replace(CPU, precision="int8")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in str(find_obstacle(BackendOptions(device="cuda")))
    assert aoti.find_target(BackendOptions(device="auto")) == "cpu"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert find_obstacle(CPU) == "torch is not installed"


def test_the_target_is_the_gpus_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: (9, gpu))
    assert aoti.find_target(BackendOptions(device="auto")) == "sm_90"
    assert aoti.find_target(BackendOptions(device="cuda", gpus=(1,))) == "sm_91"
    assert aoti.find_target(CPU) == "cpu"


@dataclass(frozen=True)
class Refused:
    """A package that must not be loaded, and why."""

    info: PackageInfo
    message: str
    max_batch: int = 3


@pytest.mark.parametrize(
    "case",
    [
        Refused(replace(INFO, target="sm_90"), "is for sm_90, this is cpu"),
        Refused(replace(INFO, torch="1.0.0"), "made with torch 1.0.0"),
        Refused(INFO, "takes 3 canvases, config.json allows batches of 8", max_batch=8),
    ],
)
def test_a_package_that_does_not_fit_is_never_loaded(
    case: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(data: bytes, device: str) -> Any:
        raise AssertionError("its code was loaded")

    monkeypatch.setattr(aoti, "load_runner", load)
    file = tmp_path / "model.cpu.fp32.pt2"
    file.write_bytes(build_archive(case.info.to_metadata()))
    with pytest.raises(BackendError, match=case.message):
        build_aoti_backend(file, CPU, served_config(file, case.max_batch))


def test_a_changed_package_is_never_loaded(tmp_path: Path) -> None:
    file = tmp_path / "model.cpu.fp32.pt2"
    file.write_bytes(build_archive(INFO.to_metadata()))
    config = served_config(file)
    content = file.read_bytes()
    for changed, reason in (
        (content + b" ", f"it has {len(content) + 1} bytes"),
        (content[:-1] + bytes([content[-1] ^ 1]), "its SHA-256 is"),
    ):
        file.write_bytes(changed)
        with pytest.raises(BackendError, match=reason):
            build_aoti_backend(file, CPU, config)
    other = config.model_copy(update={"files": {"model.onnx": FileSpec(sha256="0" * 64, bytes=1)}})
    with pytest.raises(BackendError, match=r"no model\.cpu\.fp32\.pt2"):
        build_aoti_backend(file, CPU, other)


def test_a_package_without_code_cannot_be_loaded(tmp_path: Path) -> None:
    file = tmp_path / "model.cpu.fp32.pt2"
    file.write_bytes(build_archive(INFO.to_metadata()))
    with pytest.raises(BackendError, match="torch cannot load the package"):
        build_aoti_backend(file, CPU, served_config(file))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled package: any canvas, batches up to three."""
    file = tmp_path_factory.mktemp("aoti") / "model.cpu.fp32.pt2"
    options = AotiOptions(max_batch=3)
    file.write_bytes(build_aoti(tiny_network(CONFIG), CONFIG, options, onnx_sha256="0" * 64))
    return file


@pytest.mark.slow
def test_a_compiled_package_finds_what_onnx_runtime_finds(package: Path) -> None:
    """Candidates pair up within 1e-3; the same instances come out of the service's pipeline."""
    config = served_config(package)
    backend = build_aoti_backend(package, CPU, config)
    assert (backend.name, backend.device, backend.precision) == ("aotinductor", "cpu", "fp32")
    reference = build_ort_backend(build_onnx(tiny_network(CONFIG)), CPU)
    for batch, height, width in ((1, 64, 64), (3, 96, 160), (2, 160, 96)):
        tiles = build_tiles(batch, height, width)
        pairs = zip(tiles, backend.infer(tiles), reference.infer(tiles), strict=True)
        for tile, ours, theirs in pairs:
            assert isinstance(ours, Candidates) and isinstance(theirs, Candidates)
            assert len(theirs.scores) > 10
            assert match_candidates(theirs, ours).unmatched <= 1
            check_instances(tile, ours, theirs, config)
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.infer(build_tiles(1, 64, 64))


def check_instances(tile: Tile, ours: Candidates, theirs: Candidates, config: ModelConfig) -> None:
    prepared = Prepared(tile.valid_hw, (tile,))
    found, expected = (
        [i.score for i in postprocess(prepared, [candidates], config.postprocess).instances]
        for candidates in (ours, theirs)
    )
    assert len(expected) > 0 and abs(len(found) - len(expected)) <= 1
    common = min(len(found), len(expected)) - 1
    np.testing.assert_allclose(found[:common], expected[:common], atol=1e-3)


@pytest.mark.slow
def test_a_damaged_package_is_an_error_not_a_crash(package: Path, tmp_path: Path) -> None:
    file = tmp_path / package.name
    file.write_bytes(package.read_bytes()[:-100])
    with pytest.raises(BackendError, match="no AOTInductor package"):
        build_aoti_backend(file, CPU, served_config(file))
