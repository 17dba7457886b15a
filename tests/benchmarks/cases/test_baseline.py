"""`baseline`: a model beside the classical method."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.blob_model import publish
from tests.support.tiny import build_tiny_data


def _as_regions(root: Path) -> Path:
    """The tiny data set with the classes of the blob model."""
    path = build_tiny_data(root, ("val",)) / "annotations" / "val.json"
    content = json.loads(path.read_text())
    for category, (number, name) in zip(
        content["categories"], ((20, "green"), (10, "red")), strict=True
    ):
        for annotation in content["annotations"]:
            if annotation["category_id"] == category["id"]:
                annotation["category_id"] = number
        category.update(id=number, name=name)
    path.write_text(json.dumps(content))
    return root


def test_both_are_scored_on_the_same_images(run_case: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="the extra baseline is not installed")
    data, model = _as_regions(tmp_path / "data"), publish(tmp_path / "repo")
    report = run_case("baseline", "--model", model, "--data", data, "--group-by", "group")
    names = [(row["images"], row[""]) for row in report["rows"]]
    assert names == [
        (group, name) for group in ("all", "g0", "g1") for name in (model.name, "Otsu, watershed")
    ]
    found = report["rows"][1]
    assert 0 < found["F1_50"] <= 1 and found["count_ratio"] >= 0.5
