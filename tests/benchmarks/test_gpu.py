"""The GPU benchmark, from one end to the other on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_models import MODELS, OBJECTS, build_subject, find_config
from benchmarks.gpu_plot import plot_rates
from benchmarks.plot import NO_PLOT
from pipeline.types import Candidates
from training.configs.schema import Config

COMMAND = ["--device", "cpu", "--quick", "--precision", "fp32", "--threads", "1"]


def run(out: Path, *more: str) -> Any:
    """The report of a run on one core."""
    assert gpu.main([*COMMAND, "--engine-threads", "1", "--out", str(out), *more]) == 0
    return json.loads(out.with_suffix(".json").read_text())


def check_row(row: Any) -> None:
    assert [entry["batch"] for entry in row["batches"]] == [1, 2]
    assert row["postprocess"]["instances"] > 10
    assert {entry["batch"] for entry in row["end_to_end"]} == {1, 2}
    assert all(entry["images_per_s"] > 0 for entry in row["end_to_end"])


def test_it_runs_to_its_end_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], has_matplotlib: bool
) -> None:
    out = tmp_path / "results" / "gpu"
    report = run(out, "--engines", "eager")
    assert [row["model"] for row in report["rows"]] == ["tiny_vanilla", "tiny_decoupled"]
    for row in report["rows"]:
        check_row(row)
    assert min(report["ceilings"].values()) > 0
    assert "end to end, batch 2, 1 threads" in capsys.readouterr().out
    note = plot_rates(report, out.with_suffix(".png"))
    assert note == (None if has_matplotlib else NO_PLOT)
    assert out.with_suffix(".png").is_file() == has_matplotlib


def test_an_engine_that_cannot_run_is_named(tmp_path: Path) -> None:
    report = run(tmp_path / "gpu", "--engines", "trt", "eager", "--models", "tiny_vanilla")
    assert [entry["engine"] for entry in report["skipped"]] == ["trt"]
    assert report["skipped"][0]["reason"]


@pytest.mark.slow
def test_onnx_runtime_and_compiled_packages_run_too(tmp_path: Path) -> None:
    report = run(tmp_path / "gpu", "--engines", "ort", "aoti", "--models", "tiny_decoupled")
    assert report["skipped"] == []
    for row in report["rows"]:
        check_row(row)


def test_without_a_gpu_it_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "finds no CUDA device" in capsys.readouterr().err


def test_wrong_numbers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--quick", "--batches", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err


def test_no_engine_is_built_when_the_time_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--quick", "--minutes", "0"]) == 1
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
