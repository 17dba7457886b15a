from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import annotation_of, disc, write_split
from training.coco_metrics import mask_ap

SIDE = 200


def grid_of_discs(count: int) -> list[Any]:
    return [disc(SIDE, SIDE, 4 + 8 * (i // 24), 4 + 8 * (i % 24), 3) for i in range(count)]


def truth_of(root: Path, masks: list[Any], images: int = 1) -> dict[str, Any]:
    annotations = [annotation_of(mask, 1, 3) for mask in masks]
    path = write_split(root, "val", [(f"{i}.png", SIDE, SIDE) for i in range(images)], annotations)
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def results_of(masks: list[Any], score: float = 0.9) -> list[dict[str, Any]]:
    return [
        {
            "image_id": 1,
            "category_id": 3,
            "score": score - 1e-4 * i,
            "segmentation": annotation_of(mask, 1, 3)["segmentation"],
        }
        for i, mask in enumerate(masks)
    ]


def test_perfect_results(tmp_path: Path) -> None:
    masks = grid_of_discs(20)
    found = mask_ap(truth_of(tmp_path, masks), results_of(masks))
    assert found["AP"] == found["AP50"] == found["AP75"] == found["APs"] == pytest.approx(1)
    assert found["AR"] == pytest.approx(1)
    assert found["APm"] == found["APl"] == -1


def test_dense_images_need_more_detections(tmp_path: Path) -> None:
    masks = grid_of_discs(150)
    truth, results = truth_of(tmp_path, masks), results_of(masks)
    assert mask_ap(truth, results, max_dets=500)["AP"] == pytest.approx(1)
    cut = mask_ap(truth, results, max_dets=100)
    assert cut["AR"] == pytest.approx(2 / 3, abs=1e-6)
    assert cut["AP"] == pytest.approx(67 / 101, abs=0.01)


def test_no_results_are_zero(tmp_path: Path) -> None:
    found = mask_ap(truth_of(tmp_path, grid_of_discs(3)), [])
    assert found["AP"] == found["AP50"] == found["APs"] == found["AR"] == 0
    assert found["APl"] == -1


def test_no_ground_truth_is_minus_one(tmp_path: Path) -> None:
    found = mask_ap(truth_of(tmp_path, []), results_of(grid_of_discs(2)))
    assert set(found.values()) == {-1}
    assert set(mask_ap(truth_of(tmp_path, []), []).values()) == {-1}


def test_chosen_images_alone(tmp_path: Path) -> None:
    masks = grid_of_discs(4)
    truth = truth_of(tmp_path, masks, images=2)
    truth["annotations"].append(annotation_of(masks[0], 2, 3) | {"id": 99})
    assert mask_ap(truth, results_of(masks))["AP"] < 0.9
    assert mask_ap(truth, results_of(masks), image_ids=[1])["AP"] == pytest.approx(1)
    assert mask_ap(truth, results_of(masks), image_ids=[2])["AP"] == 0


def test_a_duplicate_costs_precision(tmp_path: Path) -> None:
    masks = grid_of_discs(2)
    found = mask_ap(truth_of(tmp_path, masks), results_of([masks[0], masks[0], masks[1]]))
    assert 0.6 < found["AP"] < 0.95 and found["AR"] == pytest.approx(1)


def test_results_are_not_changed(tmp_path: Path) -> None:
    masks = grid_of_discs(2)
    results = results_of(masks)
    before = json.dumps(results)
    mask_ap(truth_of(tmp_path, masks), results)
    assert json.dumps(results) == before
