"""The benchmark of the stages on tiny images; mmdetection is not needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import pipeline
from benchmarks.plot import NO_PLOT
from benchmarks.worker import Worker


@pytest.fixture
def report(tmp_path: Path) -> pipeline.Row:
    """What our side says of a small case."""
    file = tmp_path / "case.npz"
    pipeline.write_case(file, (60, 80), 4)
    with Worker([sys.executable, "-m", "benchmarks.pipeline_ours", f"{file}"]) as side:
        return side.ask("1")


def test_a_side_that_differs_is_refused(report: pipeline.Row) -> None:
    assert pipeline.check_equal(report, report, (60, 80)) == 1
    labels = {**report, "labels": [label + 1 for label in report["labels"]]}
    with pytest.raises(ValueError, match="labels or scores differ"):
        pipeline.check_equal(report, labels, (60, 80))
    with pytest.raises(ValueError, match="labels or scores differ"):
        pipeline.check_equal(report, {**report, "labels": [], "scores": []}, (60, 80))
    turned = {**report, "counts": report["counts"][::-1]}
    with pytest.raises(ValueError, match="IoU"):
        pipeline.check_equal(report, turned, (60, 80))


def test_runs_are_summed_up_by_their_medians() -> None:
    ours = [{"cpu_s": {"all": 0.002, "nms": 0.001}}] * 3
    theirs = [{"cpu_s": {"nms": 0.01, "paste": 0.02, "encode": 0.001 * n}} for n in (10, 30, 50)]
    row = pipeline.summarise_runs(list(zip(ours, theirs, strict=True)), "cpu_s")
    assert (row["ours_ms"], row["ours_nms_ms"]) == (2, 1)
    assert row["mmdet_ms"] == pytest.approx(60)
    assert row["mmdet_encode_ms"] == pytest.approx(30)
    assert [row[k] for k in ("ratio_q1", "ratio", "ratio_q3")] == pytest.approx([25, 30, 35])


def test_the_command_without_mmdetection(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    has_matplotlib: bool,
) -> None:
    out, plot = tmp_path / "pipeline.json", tmp_path / "pipeline.svg"
    monkeypatch.setattr(pipeline, "SIZES_HW", ((60, 80), (80, 60)))
    monkeypatch.setattr(pipeline, "COUNTS", (4,))
    flags = ["--rounds", "1", "--out", f"{out}", "--plot", f"{plot}"]
    monkeypatch.setattr("sys.argv", ["pipeline", *flags])
    assert pipeline.main() == 0
    report = json.loads(out.read_text())
    assert report["command"].startswith("python -m benchmarks.pipeline --rounds 1")
    assert {row["other"] for row in report["stages"]} == {
        *("simplejpeg", "OpenCV", "Pillow", "pycocotools", "OpenCV, pycocotools"),
        *("NumPy", "ONNX Runtime"),
    }
    assert all(row["ratio"] > 0 for row in report["stages"])
    assert report["mmdet"] == []
    printed = capsys.readouterr().out
    assert "| stage | other | 80x60 | 60x80 | difference |" in printed
    assert "no --mmdet-python" in printed
    assert plot.is_file() == has_matplotlib
    assert (NO_PLOT in printed) == (not has_matplotlib)
