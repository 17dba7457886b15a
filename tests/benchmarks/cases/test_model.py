from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.cases import exits, model
from benchmarks.harness import BenchmarkError
from pipeline.types import Candidates
from tests.support.tiny_solo import tiny_config, tiny_network


def tiny_subject(_: str) -> model.CanvasSubject:
    config = tiny_config("vanilla", name="tiny")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1, 64, 96, 3), dtype=torch.uint8, generator=generator)
    return model.CanvasSubject(config, tiny_network(config), images, torch.tensor([[64, 96]]))


@pytest.mark.slow
def test_the_command_runs_all_sides_in_turns(
    run_case: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(model, "build_subject", tiny_subject)
    found = run_case("model", "--models", "tiny", "--rounds", 2)["models"]["tiny"]
    assert set(found["cpu_s"]) == set(found["wall_s"]) == {"eager", "graph", "exits"}
    assert all(len(values) == 2 for values in found["cpu_s"].values())
    assert found["candidates"] > 0
    assert found["agreement"]["graph"]["unmatched"] <= 2
    printed = capsys.readouterr().out
    assert "| tiny, 64x96 | graph with early exits |" in printed
    assert "no --mmdet-python" in printed


def test_an_interpreter_without_mmdetection_is_named(
    tmp_path: Path,
    run_case: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def subject(name: str) -> model.CanvasSubject:
        tiny = tiny_subject(name)
        return replace(tiny, config=replace(tiny.config, name="solo_512_r50"))

    monkeypatch.setattr(model, "build_subject", subject)
    monkeypatch.setattr(model, "build_onnx", lambda network: b"")
    monkeypatch.setattr(model, "add_exits", lambda graph, stride: b"")
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\necho 'no module named mmdet' >&2\nexit 1\n")
    interpreter.chmod(0o755)
    flags = ("--mmdet-python", interpreter)
    run_case("model", "--models", "solo_512_r50", *flags, status=1)
    assert "cannot run mmdetection (no module named mmdet)" in capsys.readouterr().err
    run_case("training", "--kinds", "vanilla", "--size", 64, 64, *flags, status=1)
    assert "cannot run mmdetection (no module named mmdet)" in capsys.readouterr().err


def test_random_weights_find_as_many_candidates_as_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model, "CANDIDATES", 20)
    subject = tiny_subject("tiny")
    before = len(find(subject).scores)
    model.spread_outputs(subject.network, subject.images, subject.valid_hw)
    assert 10 < len(find(subject).scores) <= 20 < before  # masks that are too small are none


def find(subject: model.CanvasSubject) -> Candidates:
    with torch.inference_mode():
        outputs = subject.network.candidates(subject.images, subject.valid_hw)
    scores, labels, masks = (output[0].numpy() for output in outputs)
    used = scores > 0
    return Candidates(scores[used], labels[used], masks[used])


def candidates(scores: list[float]) -> Candidates:
    masks = np.linspace(0, 1, 4 * len(scores), dtype=np.float32).reshape(-1, 2, 2)
    return Candidates(np.array(scores, np.float32), np.zeros(len(scores), np.int64), masks)


def test_other_candidates_are_refused_and_rounding_is_not() -> None:
    expected = candidates([0.9, 0.8, 0.7, 0.6])
    near = candidates([0.9001, 0.8, 0.7, 0.6])
    assert model.check_same("graph", expected, near)["unmatched"] == 0
    with pytest.raises(BenchmarkError, match=r"graph: 8 of 4 and 4 candidates have no partner"):
        model.check_same("graph", expected, candidates([0.5, 0.4, 0.3, 0.2]))
    with pytest.raises(BenchmarkError, match="mmdet: 0 of 0 and 0"):
        model.check_same("mmdet", candidates([]), candidates([]))


@pytest.mark.slow
def test_exits_are_measured_beside_the_plain_graph(
    run_case: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = tiny_subject("tiny")
    model.spread_outputs(subject.network, subject.images, subject.valid_hw)
    monkeypatch.setattr(exits, "build_subject", lambda _: subject)
    rows = run_case("exits", "--models", "solo_512_r50", "--rounds", 2)["rows"]
    empty = [row["empty_share"] for row in rows.values()]
    assert empty[0] == [1, 1] and empty[-1][0] == 0
    assert all(len(row["exits_cpu_s"]) == 2 for row in rows.values())
    assert "solo_512_r50, no candidate" in rows
