"""The benchmark of the stages on tiny images; mmdetection is not needed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cases import pipeline
from benchmarks.cases.pipeline import MMDET
from benchmarks.harness import BenchmarkError
from benchmarks.harness.process import ChildProcess
from benchmarks.harness.report import Row
from benchmarks.harness.rounds import Samples
from benchmarks.pipeline_ways import OURS


@pytest.fixture
def report(tmp_path: Path) -> Row:
    """What our side says of a small case."""
    file = tmp_path / "case.npz"
    pipeline.write_case(file, (60, 80), 4)
    with ChildProcess([sys.executable, "-m", "benchmarks.sides.pipeline_ours", f"{file}"]) as side:
        return side.ask("1")


def test_a_side_that_differs_is_refused(report: Row) -> None:
    assert pipeline.check_equal(report, report, (60, 80)) == 1
    labels = {**report, "labels": [label + 1 for label in report["labels"]]}
    with pytest.raises(BenchmarkError, match="labels or scores differ"):
        pipeline.check_equal(report, labels, (60, 80))
    with pytest.raises(BenchmarkError, match="labels or scores differ"):
        pipeline.check_equal(report, {**report, "labels": [], "scores": []}, (60, 80))
    turned = {**report, "counts": report["counts"][::-1]}
    with pytest.raises(BenchmarkError, match="IoU"):
        pipeline.check_equal(report, turned, (60, 80))


def test_runs_are_summed_up_by_their_medians() -> None:
    ours = {"all_cpu_s": [0.002] * 3, "nms_cpu_s": [0.001] * 3}
    theirs = {
        "nms_cpu_s": [0.01] * 3,
        "paste_cpu_s": [0.02] * 3,
        "encode_cpu_s": [0.01, 0.03, 0.05],
    }
    row = pipeline.summarise(Samples({OURS: ours, MMDET: theirs}), "cpu_s")
    assert (row["ours_ms"], row["ours_nms_ms"]) == (2, 1)
    assert row["mmdet_ms"] == pytest.approx(60)
    assert row["mmdet_encode_ms"] == pytest.approx(30)
    assert [row["ratio"][k] for k in ("low", "median", "high")] == pytest.approx([20, 30, 40])


def test_the_command_without_mmdetection(
    run_case: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pipeline, "SIZES_HW", ((60, 80), (80, 60)))
    monkeypatch.setattr(pipeline, "COUNTS", (4,))
    report = run_case("pipeline", "--rounds", 1)
    assert report["command"].startswith("python -m benchmarks pipeline --rounds 1")
    assert {row["other"] for row in report["stages"]} == {
        *("simplejpeg", "OpenCV", "Pillow", "pycocotools", "OpenCV, pycocotools"),
        *("NumPy", "ONNX Runtime"),
    }
    assert all(row["ratio"]["median"] > 0 for row in report["stages"])
    assert report["mmdet"] == []
    printed = capsys.readouterr().out
    assert "| stage | other | 80x60 | 60x80 | difference |" in printed
    assert "no --mmdet-python" in printed


def test_each_stage_has_a_panel_and_each_way_a_line() -> None:
    row = {"stage": "decode", "other": "Pillow", "ours_ms": 1.0, "other_ms": 2.0}
    rows = [{**row, "image_hw": hw} for hw in ((100, 100), (200, 100))]
    mmdet = {"clock": "cpu_s", "masks": 4, "image_hw": (100, 100), "ours_ms": 3, "mmdet_ms": 4}
    decode, whole = pipeline.build_panels(rows, [mmdet, {**mmdet, "clock": "wall_s"}])
    assert decode.lines == {OURS: [(0.01, 1), (0.02, 1)], "Pillow": [(0.01, 2), (0.02, 2)]}
    assert whole.lines == {OURS: [(0.01, 3)], MMDET: [(0.01, 4)]}
