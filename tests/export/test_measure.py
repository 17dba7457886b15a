from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from export.measure import describe_quality, read_curves
from tests.support.tiny import build_tiny_data
from tests.support.typed_graph import build_config, build_graph
from training.data.coco import CocoDataset
from training.evaluation_report import evaluate_results
from training.reproduce import describe_measured


@pytest.fixture
def data(tmp_path: Path) -> CocoDataset:
    return CocoDataset(build_tiny_data(tmp_path), "val")


def results_of(data: CocoDataset, scores: list[float]) -> list[dict[str, Any]]:
    """The labelled objects as results, with these scores."""
    keys = ("image_id", "category_id", "segmentation")
    truth = [{k: a[k] for k in keys} for a in data.truth()["annotations"]]
    return [{**item, "score": s} for item, s in zip(truth, scores, strict=True)]


def measure(results: list[dict[str, Any]], data: CocoDataset, threshold: float) -> dict[str, Any]:
    report = evaluate_results(data, results, max_dets=100, score_threshold=threshold)
    described: dict[str, Any] = describe_measured(report, data, "val", 100)
    return described


def test_the_quality_tells_how_many_objects_the_threshold_leaves(data: CocoDataset) -> None:
    model = build_config(build_graph())
    threshold = model.postprocess.score_threshold
    labelled = data.report.objects
    assert labelled > 1
    results = results_of(data, [threshold] + [threshold - 0.01] * (labelled - 1))
    text = describe_quality(model, measure(results, data, threshold), data)
    assert f"AP 1.000, AP50 1.000 on {len(data)} images" in text
    assert f"finds 1 objects where {labelled} are labelled" in text
    assert "finds 0 objects" in describe_quality(model, measure([], data, threshold), data)


def test_the_curves_beside_a_checkpoint_are_published(tmp_path: Path) -> None:
    assert read_curves(tmp_path / "best.pt") == {}
    (tmp_path / "metrics.csv").write_bytes(b"step,name,value\n")
    assert read_curves(tmp_path / "best.pt") == {"metrics.csv": b"step,name,value\n"}
