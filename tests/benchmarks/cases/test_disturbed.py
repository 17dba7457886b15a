"""`disturbed`: a model on changed images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from benchmarks.cases import disturbed
from pipeline.decode import decode_image
from tests.support.tiny import build_tiny_data
from training.data.coco import CocoDataset


@pytest.fixture
def source(tmp_path: Path) -> CocoDataset:
    return CocoDataset(build_tiny_data(tmp_path / "data", ("val",)), "val")


@pytest.mark.parametrize(("name", "zoom"), disturbed.ZOOMS.items())
def test_objects_keep_their_place_when_images_are_resized(
    source: CocoDataset, tmp_path: Path, name: str, zoom: float
) -> None:
    folder = tmp_path / "changed"
    folder.mkdir()
    changed = disturbed.write_changed(source, folder, name, zoom, 1)
    assert len(changed) == len(source) and changed.classes == source.classes
    for index, record in enumerate(source.records):
        image, old = (
            decode_image(changed.image_bytes(index)),
            decode_image(source.image_bytes(index)),
        )
        assert image.shape[0] == round(old.shape[0] * zoom)
        for before, after in zip(
            record.annotations, changed.records[index].annotations, strict=True
        ):
            assert before.label == after.label
            areas = [int(coco_mask.area(item.rle)) for item in (before, after)]
            assert areas[1] == pytest.approx(areas[0] * zoom**2, rel=0.1)
            inside = image[coco_mask.decode(after.rle) > 0].mean()
            assert inside == pytest.approx(old[coco_mask.decode(before.rle) > 0].mean(), abs=12)


@pytest.mark.parametrize("name", disturbed.CHANGES)
def test_other_changes_keep_the_objects(source: CocoDataset, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "changed"
    folder.mkdir()
    changed = disturbed.write_changed(source, folder, name, 1.0, 2)
    assert len(changed) == 2
    for index, record in enumerate(source.records[::2]):
        areas = [
            [int(coco_mask.area(a.rle)) for a in r.annotations]
            for r in (record, changed.records[index])
        ]
        assert areas[0] == areas[1]
    before, after = (
        decode_image(split.image_bytes(0)).astype(float) for split in (source, changed)
    )
    assert np.array_equal(before, after) == (name == "as they are")


def test_the_scale_is_given_where_images_are_resized(run_case: Callable[..., Any]) -> None:
    report = run_case("disturbed", "--changes", "as they", "half", "--every", "9")
    rows = [(row["images"], row["scale"], row["number"]) for row in report["rows"]]
    assert rows == [
        ("as they are", "own", 1),
        *(("half size", scale, 1) for scale in ("own", "size", "auto")),
    ]
    assert all(0 <= row["AP"] <= 1 for row in report["rows"])
    assert report["rows"][0]["AP"] > report["rows"][1]["AP"]
