"""The GPU benchmark, from one end to the other on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import engines as gpu_engines
from benchmarks.gpu.engines import EngineRecipe, find_package
from benchmarks.gpu.subjects import MODELS, OBJECTS, build_subject, find_config
from export.to_aoti import AotiOptions, describe_package
from pipeline.types import Candidates
from tests.service.engines.test_aoti_package import build_archive
from training.configs.schema import Config

RunCase = Callable[..., Any]
COMMAND = (*("gpu", "--device", "cpu", "--quick", "--precision", "fp32"), "--threads", "1")
ONE_CORE = ("--engine-threads", "1")


def check_row(row: Any) -> None:
    assert [entry["batch"] for entry in row["batches"]] == [1, 2]
    assert row["postprocess"]["instances"] > 10
    assert {entry["batch"] for entry in row["end_to_end"]} == {1, 2}
    assert all(entry["images_per_s"] > 0 for entry in row["end_to_end"])


def test_it_runs_to_its_end_without_a_gpu(
    run_case: RunCase, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ("tiny_vanilla", "tiny_decoupled")
    report = run_case(*COMMAND, *ONE_CORE, "--engines", "trt", "ort", "--models", *models)
    assert [row["model"] for row in report["rows"]] == list(models)
    for row in report["rows"]:
        check_row(row)
    assert min(report["ceilings"].values()) > 0
    assert [entry["engine"] for entry in report["skipped"]] == ["trt", "trt"]
    assert all(entry["reason"] for entry in report["skipped"])
    printed = capsys.readouterr().out
    assert "| tiny_vanilla | onnxruntime fp32 | 2 |" in printed
    assert "not measured: tiny_vanilla with trt: " in printed


@pytest.mark.slow
def test_compiled_packages_run_too(run_case: RunCase) -> None:
    flags = ("--engines", "eager", "aoti", "--models", "tiny_decoupled")
    report = run_case(*COMMAND, *ONE_CORE, *flags)
    assert report["skipped"] == []
    assert [row["engine"] for row in report["rows"]] == ["eager", "aotinductor"]
    for row in report["rows"]:
        check_row(row)


def test_a_package_is_compiled_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as torch, machine and network are the same, and batches do not get larger."""
    made: list[int] = []

    def build(network: object, config: Config, options: AotiOptions) -> bytes:
        made.append(options.max_batch)
        return build_archive(describe_package(config, options).to_metadata())

    monkeypatch.setattr(gpu_engines, "build_aoti", build)
    recipe = EngineRecipe(device="cpu", precision="fp32")
    small, large = (build_subject("tiny_vanilla", batch) for batch in (2, 4))
    file = find_package(small, recipe, tmp_path)
    assert file == tmp_path / "tiny_vanilla" / "model.cpu.fp32.pt2"
    assert find_package(small, recipe, tmp_path) == file and made == [2]
    find_package(large, recipe, tmp_path)
    find_package(small, recipe, tmp_path)
    assert made == [2, 4]
    file.write_bytes(b"cut short")
    find_package(small, recipe, tmp_path)
    other = replace(describe_package(small.config, recipe.package_options(small.served)), torch="1")
    file.write_bytes(build_archive(other.to_metadata()))
    find_package(small, recipe, tmp_path)
    assert made == [2, 4, 2, 2]
    assert sorted(path.name for path in file.parent.iterdir()) == [file.name]


def test_without_a_gpu_it_refuses(
    run_case: RunCase, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_case("gpu", status=1) is None
    assert "finds no CUDA device" in capsys.readouterr().err


def test_wrong_numbers_are_refused(run_case: RunCase, capsys: pytest.CaptureFixture[str]) -> None:
    run_case("gpu", "--device", "cpu", "--quick", "--batches", 0, status=1)
    assert "at least 1" in capsys.readouterr().err


def test_no_engine_is_built_when_the_time_is_over(
    run_case: RunCase, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--models", "tiny_vanilla", "--minutes", 0)
    assert run_case("gpu", "--device", "cpu", "--quick", *flags, status=1)["rows"] == []
    assert "were over" in capsys.readouterr().out


def test_the_models_are_those_of_the_paper() -> None:
    configs: list[Config] = [find_config(name) for name in MODELS]
    assert [config.name for config in configs] == list(MODELS)
    for config in configs:
        assert (
            config.input.resize
            == find_config("solo_512_r50" if "512" in config.name else "solo_r50").input.resize
        )
        assert (config.model.head.kind == "decoupled") == ("decoupled" in config.name)
        assert config.model.backbone.depth == (101 if "r101" in config.name else 50)


def test_forced_candidates_leave_the_network_at_work() -> None:
    subject = build_subject("tiny_vanilla", 2)
    images = torch.from_numpy(subject.tile.image)[None]
    valid_hw = torch.tensor([subject.tile.valid_hw])
    with torch.no_grad():
        scores, labels, probs = subject.network.candidates(images, valid_hw)
    found = Candidates(scores[0].numpy(), labels[0].numpy(), probs[0].numpy())
    assert len(found.scores) == min(60, OBJECTS) and (found.scores > 0.1).all()
    assert found.mask_hw == (subject.canvas_hw[0] // 4, subject.canvas_hw[1] // 4)
    assert (found.mask_probs > 0.5).any(axis=(1, 2)).mean() > 0.5  # the least are below a pixel
