"""The report of solo-eval: groups, classes, images."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest

from tests.support.tiny import build_tiny_data
from training.coco_metrics import mask_ap
from training.data.coco import CocoDataset
from training.data.records import DatasetError
from training.evaluation_report import evaluate_results, group_images


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    return CocoDataset(build_tiny_data(tmp_path_factory.mktemp("data"), ("val",)), "val")


def _results(data: CocoDataset, *, discs: bool) -> list[dict[str, Any]]:
    """All objects as results, or those of class 7, `box`, alone."""
    return [
        {**a, "score": 0.9, "segmentation": dict(a["segmentation"])}
        for a in data.truth()["annotations"]
        if discs or a["category_id"] == 7
    ]


def test_rows_of_all_images_and_of_groups(data: CocoDataset) -> None:
    groups = group_images(data, "group")
    assert {name: len(ids) for name, ids in groups.items()} == {"g0": 1, "g1": 2}
    report = evaluate_results(
        data, _results(data, discs=False), max_dets=100, score_threshold=0.5, groups=groups
    )
    assert list(report.rows) == ["all", "g0", "g1"]
    row = report.rows["all"]
    assert row["F1_50"] == pytest.approx(2 * 2 / (4 + 2)) and row["count_ratio"] == 0.5
    assert row["classes"] == {
        "disc": {"AP": 0.0, "AP50": 0.0},
        "box": {"AP": pytest.approx(1.0), "AP50": pytest.approx(1.0)},
    }
    expected = mask_ap(data.truth(), _results(data, discs=False))
    assert {name: row[name] for name in expected} == expected
    lines = report.describe()
    assert "0.5" in lines[0] and "F1_50 0.6667" in lines[1] and lines[1].split()[0] == "all"
    assert [line.split() for line in lines[-2:]] == [
        ["disc", "AP", "0.0000", "AP50", "0.0000"],
        ["box", "AP", "1.0000", "AP50", "1.0000"],
    ]


def test_scores_below_the_threshold_count_for_the_ap_alone(data: CocoDataset) -> None:
    report = evaluate_results(data, _results(data, discs=True), max_dets=100, score_threshold=0.95)
    assert report.rows["all"]["AP"] == pytest.approx(1) and report.rows["all"]["F1_50"] == 0


def test_each_image_has_a_row(data: CocoDataset) -> None:
    report = evaluate_results(data, _results(data, discs=False), max_dets=100, score_threshold=0.5)
    rows = list(csv.DictReader(io.StringIO(report.format_images())))
    assert [(r["file_name"], r["labelled"], r["found"]) for r in rows] == [
        ("val1.png", "2", "1"),
        ("val2.png", "2", "1"),
        ("val3.png", "0", "0"),
    ]
    assert [float(r["F1_50"]) for r in rows] == [0.6667, 0.6667, -1]


def test_groups_by_a_part_of_a_field(data: CocoDataset) -> None:
    assert set(group_images(data, "file_name:[0-9]")) == {"1", "2", "3"}
    assert {n: len(i) for n, i in group_images(data, "file_name:^([a-z]+)").items()} == {"val": 3}
    assert group_images(data, None) == {}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("modality", "no field 'modality'"),
        ("file_name:^x", "matches nothing in 'val1.png'"),
        ("file_name:(", "is wrong"),
        ("file_name:al", None),
    ],
)
def test_groups_that_cannot_be_formed(data: CocoDataset, rule: str, message: str | None) -> None:
    if message is None:
        assert set(group_images(data, rule)) == {"al"}
        return
    with pytest.raises(DatasetError, match=message):
        group_images(data, rule)
