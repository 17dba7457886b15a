from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.tiny import build_tiny_data, disc, rle_of
from training.coco_metrics import mask_ap
from training.data.coco import CocoDataset
from training.error_analysis import with_ground_truth_masks


@pytest.fixture
def data(tmp_path: Path) -> CocoDataset:
    return CocoDataset(build_tiny_data(tmp_path), "val")


def result(image_id: int | str, category_id: int, mask: Any, score: float = 0.9) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": rle_of(mask),
        "score": score,
    }


def test_the_most_overlapping_object_replaces_the_mask(data: CocoDataset) -> None:
    record = data.records[0]
    category = data.classes[record.annotations[0].label].category_id
    rough = result(record.image_id, category, disc(64, 64, 22, 19, 6))
    before = mask_ap(data.truth(), [rough], max_dets=100)
    (found,) = with_ground_truth_masks([rough], data)
    assert found["segmentation"]["counts"].encode() == record.annotations[0].rle["counts"]
    assert (found["score"], found["category_id"]) == (0.9, category)
    after = mask_ap(data.truth(), [found], max_dets=100)
    assert before["AP"] == 0 < after["AP"]
    assert rough["segmentation"] != found["segmentation"]  # the input is not changed


def test_what_overlaps_nothing_stays(data: CocoDataset) -> None:
    corner = np.zeros((64, 64), np.uint8)
    corner[:3, -3:] = 1
    no_objects = data.records[2].image_id
    results = [result(data.records[0].image_id, 1, corner), result(no_objects, 1, corner)]
    assert with_ground_truth_masks(results, data) == results
    assert with_ground_truth_masks([], data) == []


def test_an_image_of_another_split_is_refused(data: CocoDataset) -> None:
    with pytest.raises(ValueError, match="image 99 is not in"):
        with_ground_truth_masks([result(99, 1, disc(64, 64, 20, 20, 5))], data)
