"""Images of which not all classes are labelled: their fields, and what training sees of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import TINY, annotation_of, build_tiny_data, disc
from training.data.coco import CocoDataset
from training.data.content import CocoContent
from training.data.loader import build_loader
from training.data.records import FederatedLabels
from training.data.report import Kind
from training.data.validate import Checked, check_content

MASK = disc(20, 30, 9, 9, 5)
CATEGORIES = [{"id": i, "name": f"c{i}"} for i in (3, 5, 8, 9)]  # labels 0 to 3
NEG, PARTIAL = "neg_category_ids", "not_exhaustive_category_ids"


def check(fields: dict[str, Any], *category_ids: int, **more: Any) -> Checked:
    """One image with an object of each of these categories."""
    image = {"id": 1, "file_name": "a.png", "height": 20, "width": 30, **fields}
    annotations = [
        {"id": n, **annotation_of(MASK, 1, category_id, **more)}
        for n, category_id in enumerate(category_ids, 1)
    ]
    return check_content(CocoContent("t", Path(), [image], CATEGORIES, annotations), None)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({NEG: None, PARTIAL: None}, None),
        ({PARTIAL: []}, None),
        ({NEG: [], PARTIAL: []}, [1, 0, 0, 0]),
        ({NEG: [8]}, [1, 0, 1, 0]),
        ({NEG: [8, "9"], PARTIAL: [3]}, [0, 0, 1, 1]),
        ({PARTIAL: [3, 9.0]}, [0, 1, 1, 0]),
    ],
)
def test_which_classes_are_labelled_exhaustively(
    fields: dict[str, Any], expected: list[int] | None
) -> None:
    checked = check(fields, 3)
    assert checked.report.refusal is None
    found = checked.records[0].exhaustive(4)
    assert (None if found is None else found.astype(int).tolist()) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({NEG: 8}, "neg_category_ids is 8, expected a list"),
        ({PARTIAL: {"a": 1}}, "not_exhaustive_category_ids is {'a': 1}, expected a list"),
        ({NEG: [8, 77]}, "neg_category_ids names 77, a category is not listed"),
        ({NEG: [True]}, "neg_category_ids names True"),
        ({PARTIAL: [[3]]}, r"not_exhaustive_category_ids names \[3\]"),
        ({NEG: [8, 9], PARTIAL: [9]}, "category 9 is in neg_category_ids and in not_exhaustive"),
        ({NEG: [3]}, "has an object of category 3, which is in neg_category_ids"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    checked = check(fields, 3)
    assert checked.report.count(Kind.LABELLED_CLASSES) == 1
    refusal = checked.report.refusal or ""
    assert "image 1 ('a.png')" in refusal and re.search(message, refusal), refusal


def test_a_crowd_of_a_negative_class_is_refused_too() -> None:
    assert check({NEG: [5]}, 5, iscrowd=1).report.count(Kind.LABELLED_CLASSES) == 1


def test_an_object_without_a_mask_leaves_its_class_open() -> None:
    checked = check({NEG: [8]}, 3, segmentation=[])
    found = checked.records[0].exhaustive(4)
    assert found is not None and found.tolist() == [False, False, True, False]


def write_federated(root: Path, fields: list[dict[str, Any]]) -> Path:
    """Tiny data (categories 3 and 7) whose images have these fields."""
    build_tiny_data(root, ("train",))
    path = root / "annotations" / "train.json"
    content = json.loads(path.read_text())
    for image, more in zip(content["images"], fields, strict=True):
        image.update(more)
    path.write_text(json.dumps(content))
    return root


def test_the_truth_has_the_fields_again(tmp_path: Path) -> None:
    fields = [{PARTIAL: [7], NEG: []}, {}, {NEG: [3], PARTIAL: []}]
    data = CocoDataset(write_federated(tmp_path, fields), "train")
    sizes = ("id", "height", "width")
    found = [{k: v for k, v in i.items() if k not in sizes} for i in data.truth()["images"]]
    assert found == fields
    assert data.records[1].federated is None
    assert data.records[2].federated == FederatedLabels(frozenset({0}), frozenset())


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_batches_say_which_classes_are_known(workers: int, tmp_path: Path) -> None:
    fields = [{PARTIAL: [7], NEG: []}, {}, {NEG: [3]}]
    data = CocoDataset(write_federated(tmp_path, fields), "train")
    loader = build_loader(data, TINY, seed=0, start_step=0, stop_step=3, workers=workers)
    images = [levels for batch in loader for levels in batch.targets]
    found = set()
    for levels in images:
        of_levels = [None if t.exhaustive is None else tuple(t.exhaustive.tolist()) for t in levels]
        assert len(set(of_levels)) == 1
        found.add(of_levels[0])
    assert found == {(True, False), None} and len(images) == 6
