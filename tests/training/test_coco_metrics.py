from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.support.tiny import annotation_of, disc, rle_of, write_image, write_split
from training.coco_metrics import describe_metrics, mask_ap, score_masks
from training.data.coco import CocoDataset

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
    assert describe_metrics(found).startswith("AP 1.0000 AP50 1.0000 ")
    assert describe_metrics(found).endswith(" APm - APl - AR 1.0000")
    assert describe_metrics({"AP": 0.0}) == "AP 0.0000"


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
    assert score_masks(truth, results_of(masks), image_ids=[1])[0]["AP"] == pytest.approx(1)
    assert score_masks(truth, results_of(masks), image_ids=[2])[0]["AP"] == 0


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


@pytest.mark.parametrize("seed", range(4))
def test_the_score_is_that_of_pycocotools_on_the_file(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = [(f"{i}.png", 60, 80) for i in range(4)]
    annotations, results = [], []
    for _ in range(60):
        image_id, category_id = int(rng.integers(1, 5)), int(rng.choice([3, 7]))
        y, x, radius = rng.uniform(5, 55), rng.uniform(5, 75), rng.uniform(3, 20)
        angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
        outline = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], 1).ravel()
        truth = annotation_of(disc(60, 80, y, x, radius), image_id, category_id)
        truth["area"] = float(rng.choice([truth["area"], 500, 2000, 20000]))
        truth["iscrowd"] = int(rng.random() < 0.1)
        if rng.random() < 0.5:
            truth["segmentation"] = [outline.tolist()]
        annotations.append(truth)
        found = disc(60, 80, y + rng.normal(), x + rng.normal(), radius)
        result = {"image_id": image_id, "category_id": category_id, "score": float(rng.random())}
        results.append(result | {"segmentation": rle_of(found)})
    for name, height, width in images:
        write_image(tmp_path / "images" / name, np.zeros((height, width, 3), np.uint8))
    path = write_split(tmp_path, "val", images, annotations)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(
            COCO(str(path)), COCO(str(path)).loadRes([dict(r) for r in results]), "segm"
        )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    data = CocoDataset(tmp_path, "val")
    assert sum(len(r.crowds) for r in data.records) > 0
    metrics, classes = score_masks(data.truth(), results)
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    assert tuple(metrics[name] for name in names) == tuple(evaluation.stats[:6])
    assert metrics["AR"] == evaluation.stats[8] and metrics["AP"] > 0.1
    for category in data.classes:
        evaluation.params.catIds = [category.category_id]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        of_class = classes[category.name]
        assert (of_class["AP"], of_class["AP50"]) == tuple(evaluation.stats[:2])
