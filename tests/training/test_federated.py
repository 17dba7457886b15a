"""Federated labels: the AP against LVIS's rules, computed by themselves; and a training."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from tests.support.tiny import TINY, annotation_of, build_tiny_data, disc
from training.coco_metrics import mask_ap
from training.data.coco import CocoDataset
from training.federated import ignore_unlabelled
from training.run_options import RunOptions
from training.trainer import Trainer

SIDE = 96
CATEGORIES = (3, 5, 8)
THRESHOLDS = np.linspace(0.5, 0.95, 10)
NEG, PARTIAL = "neg_category_ids", "not_exhaustive_category_ids"
Entry = dict[str, Any]


def scene(rng: np.random.Generator, images: int) -> tuple[Entry, list[Entry]]:
    """Ground truth and results; labels of every kind occur."""
    annotations: list[Entry] = []
    results: list[Entry] = []
    entries: list[Entry] = []
    for image_id in range(1, images + 1):
        present = set()
        for category_id in CATEGORIES:
            for _ in range(int(rng.integers(0, 3))):
                y, x, radius = rng.uniform(15, 80), rng.uniform(15, 80), rng.uniform(5, 14)
                mask = disc(SIDE, SIDE, y, x, radius)
                annotations.append(annotation_of(mask, image_id, category_id))
                present.add(category_id)
                if rng.random() < 0.8:
                    moved = disc(SIDE, SIDE, y + rng.uniform(-3, 3), x, radius)
                    results.append(result(moved, image_id, category_id, rng))
            for _ in range(int(rng.integers(0, 3))):
                mask = disc(SIDE, SIDE, rng.uniform(15, 80), rng.uniform(15, 80), 8)
                results.append(result(mask, image_id, category_id, rng))
        absent = [c for c in CATEGORIES if c not in present]
        fields: Entry = {
            NEG: [c for c in absent if rng.random() < 0.5],
            PARTIAL: [c for c in sorted(present) if rng.random() < 0.4],
        }
        kind = image_id % 4
        if kind == 0:
            fields = {}
        elif kind == 1:
            fields = {PARTIAL: [CATEGORIES[image_id % 3]]}
        entries.append({"id": image_id, "height": SIDE, "width": SIDE, **fields})
    truth = {
        "images": entries,
        "categories": [{"id": c, "name": f"c{c}"} for c in CATEGORIES],
        "annotations": [{"id": n, **a} for n, a in enumerate(annotations, 1)],
    }
    return truth, results


def result(mask: Any, image_id: int, category_id: int, rng: np.random.Generator) -> Entry:
    segmentation = annotation_of(mask, image_id, category_id)["segmentation"]
    return {
        "image_id": image_id,
        "category_id": category_id,
        "score": float(rng.random()),
        "segmentation": segmentation,
    }


@cache
def decode(counts: str) -> NDArray[np.bool_]:
    return np.asarray(coco_mask.decode({"size": [SIDE, SIDE], "counts": counts}), np.bool_)


def pixels(entry: Entry) -> NDArray[np.bool_]:
    return decode(entry["segmentation"]["counts"])


def lvis_ap(truth: Entry, results: list[Entry]) -> float:
    """Mean AP over thresholds and classes, by the definitions and without a library."""
    return float(np.mean([class_ap(truth, results, c, t) for c in CATEGORIES for t in THRESHOLDS]))


def class_ap(truth: Entry, results: list[Entry], category_id: int, threshold: float) -> float:
    ranked: list[tuple[float, bool]] = []  # score, whether it is a hit
    count = 0
    for image in truth["images"]:
        found = [
            r for r in results if (r["image_id"], r["category_id"]) == (image["id"], category_id)
        ]
        objects = [
            pixels(a)
            for a in truth["annotations"]
            if (a["image_id"], a["category_id"]) == (image["id"], category_id)
        ]
        if NEG in image and not objects and category_id not in image[NEG]:
            continue  # not known there
        count += len(objects)
        free = set(range(len(objects)))
        for each in sorted(found, key=lambda r: -r["score"]):
            mask = pixels(each)
            overlaps = {i: (mask & objects[i]).sum() / (mask | objects[i]).sum() for i in free}
            best = max(overlaps, key=lambda i: overlaps[i], default=None)
            if best is not None and overlaps[best] >= threshold:
                free.remove(best)
                ranked.append((each["score"], True))
            elif category_id not in image.get(PARTIAL, ()):
                ranked.append((each["score"], False))
    ranked.sort(key=lambda pair: -pair[0])
    hits = np.cumsum([hit for _, hit in ranked])
    precision = hits / np.arange(1, len(ranked) + 1)
    recall = hits / count
    at = [precision[recall >= r].max(initial=0) for r in np.linspace(0, 1, 101)]
    return float(np.mean(at))


@pytest.mark.parametrize("seed", range(2))
def test_the_ap_is_that_of_lvis(seed: int) -> None:
    truth, results = scene(np.random.default_rng(seed), 12)
    found = mask_ap(truth, results)["AP"]
    assert found == pytest.approx(lvis_ap(truth, results), abs=1e-9)
    plain = {
        **truth,
        "images": [
            {k: v for k, v in i.items() if k not in (NEG, PARTIAL)} for i in truth["images"]
        ],
    }
    ordinary = mask_ap(plain, results)["AP"]
    assert ordinary == pytest.approx(lvis_ap(plain, results), abs=1e-9)
    assert found > ordinary + 0.01


def test_plain_labels_are_not_touched() -> None:
    truth, results = scene(np.random.default_rng(0), 4)
    truth["images"] = [{"id": i["id"]} for i in truth["images"]]
    assert ignore_unlabelled(truth, results) == (truth, results)
    assert ignore_unlabelled(truth, results)[0] is truth


def test_the_ground_truth_is_not_changed() -> None:
    truth, results = scene(np.random.default_rng(1), 16)
    count = len(truth["annotations"])
    changed, kept = ignore_unlabelled(truth, results)
    assert len(truth["annotations"]) == count < len(changed["annotations"])
    ids = [annotation["id"] for annotation in changed["annotations"]]
    assert len(set(ids)) == len(ids) and len(kept) < len(results)


def test_results_for_an_image_without_negatives_and_objects() -> None:
    image = {"id": 1, "height": SIDE, "width": SIDE, NEG: [], PARTIAL: []}
    other = {"id": 2, "height": SIDE, "width": SIDE}
    mask = disc(SIDE, SIDE, 40, 40, 9)
    truth = {
        "images": [image, other],
        "categories": [{"id": 3, "name": "c3"}],
        "annotations": [{"id": 1, **annotation_of(mask, 2, 3)}],
    }
    rng = np.random.default_rng(0)
    results = [{**result(mask, i, 3, rng), "score": 0.9 - 0.1 * i} for i in (1, 2)]
    assert mask_ap(truth, results)["AP"] == pytest.approx(1)


def test_an_unlabelled_class_is_not_trained(tmp_path: Path) -> None:
    """Discs are labelled, boxes are not: the output's bias, which has no weight decay, shows it."""
    path = build_tiny_data(tmp_path, ("train",)) / "annotations" / "train.json"
    content = json.loads(path.read_text())
    discs = [a for a in content["annotations"] if a["category_id"] == 3]
    labelled = {a["image_id"] for a in discs}
    for image in content["images"]:
        image[NEG] = [] if image["id"] in labelled else [3]
    assert len(content["annotations"]) == 4 and len(labelled) == 2
    path.write_text(json.dumps({**content, "annotations": discs}))
    trainer = Trainer(
        TINY,
        CocoDataset(tmp_path, "train"),
        RunOptions(out=tmp_path / "run", workers=0),
        None,
    )
    bias = trainer.model.state_dict()["head.category_out.bias"]
    before = bias.tolist()
    trainer.fit()
    assert bias[0] != before[0] and bias[1] == before[1]
