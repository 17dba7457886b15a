"""F1, AJI, counts and recall, compared with computations on pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from tests.support.tiny import UInt8, annotation_of, disc
from training.instance_metrics import UNDEFINED, ImageScore, score_image, score_images, summarise

HW = (60, 80)


def _entries(masks: list[UInt8], **more: Any) -> list[dict[str, Any]]:
    return [
        annotation_of(mask, 1, 3, score=round(0.99 - 0.01 * i, 2), **more)
        for i, mask in enumerate(masks)
    ]


def _random_discs(rng: np.random.Generator, count: int) -> list[UInt8]:
    """Discs without overlap; the later ones lose shared pixels."""
    taken, masks = np.zeros(HW, bool), []
    for _ in range(count):
        y, x, radius = rng.uniform(5, HW[0] - 5), rng.uniform(5, HW[1] - 5), rng.uniform(2, 9)
        mask = (disc(*HW, y, x, radius) > 0) & ~taken
        taken |= mask
        if mask.any():
            masks.append(mask.astype(np.uint8))
    return masks


def _shift(rng: np.random.Generator, masks: list[UInt8]) -> list[UInt8]:
    """Predictions without overlap: some objects moved, some left out, some invented."""
    taken, moved = np.zeros(HW, bool), []
    for mask in [m for m in masks if rng.uniform() < 0.8] + _random_discs(rng, 3):
        y, x = rng.integers(-2, 3, 2)
        shifted = (np.roll(mask, (y, x), (0, 1)) > 0) & ~taken
        taken |= shifted
        if shifted.any():
            moved.append(shifted.astype(np.uint8))
    return moved


def _brute_aji(truth: list[UInt8], found: list[UInt8]) -> float:
    """As in Kumar et al. 2017, on pixels."""
    intersection = union = 0
    used = set()
    for mask in truth:
        ratios = [(mask & other).sum() / (mask | other).sum() for other in found]
        if not ratios or max(ratios) == 0:
            union += int(mask.sum())
            continue
        best = int(np.argmax(ratios))
        used.add(best)
        intersection += int((mask & found[best]).sum())
        union += int((mask | found[best]).sum())
    union += sum(int(mask.sum()) for i, mask in enumerate(found) if i not in used)
    return intersection / union


def _brute_right(truth: list[UInt8], found: list[UInt8], threshold: float) -> int:
    """Pairs of IoU above 0.5 are unique where masks do not overlap."""
    ratios = [[(a & b).sum() / (a | b).sum() for b in truth] for a in found]
    return sum(any(r >= threshold for r in row) for row in ratios)


@pytest.mark.parametrize("seed", range(8))
def test_equal_to_computations_on_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = _random_discs(rng, 12)
    found = _shift(rng, truth)
    score = score_image(1, _entries(found), _entries(truth))
    assert score.right_50 == _brute_right(truth, found, 0.5) > 0
    assert score.right_70 == _brute_right(truth, found, 0.7)
    assert score.aji == pytest.approx(_brute_aji(truth, found))
    assert (score.labelled, score.found) == (len(truth), len(found))
    row = summarise([score])
    tp, fp = score.right_50, len(found) - score.right_50
    fn = len(truth) - tp
    assert row["F1_50"] == pytest.approx(tp / (tp + (fp + fn) / 2))
    assert row["DSB_50"] == pytest.approx(tp / (tp + fp + fn))


def test_recall_by_the_area_of_the_mask() -> None:
    masks = [disc(*HW, 10, 10, 2), disc(*HW, 10, 40, 6), disc(*HW, 40, 40, 18)]
    small, middle, large = (int(m.sum()) for m in masks)
    assert small < 64 < middle < 256 < large
    objects = [{**entry, "area": 5000} for entry in _entries(masks)]
    row = summarise([score_image(1, _entries(masks[1:]), objects)])
    assert row["recall_0_64"] == 0 and row["recall_64_256"] == row["recall_256_1024"] == 1
    assert row["recall_1024_up"] == UNDEFINED
    row = summarise([score_image(1, _entries(masks[:1]), objects)], [small])
    assert row[f"recall_0_{small}"] == UNDEFINED
    assert row[f"recall_{small}_up"] == pytest.approx(1 / 3)


def test_instances_in_a_crowd_do_not_count() -> None:
    masks = [disc(*HW, 10, 10, 5), disc(*HW, 40, 40, 5), disc(*HW, 40, 70, 5)]
    crowd = _entries([disc(*HW, 40, 40, 15)], iscrowd=1)
    score = score_image(1, _entries(masks), _entries(masks[:1]), crowd)
    assert (score.found, score.right_50, score.labelled) == (2, 1, 1)
    assert score.aji == pytest.approx(masks[0].sum() / (masks[0].sum() + masks[2].sum()))


def test_classes_do_not_match_each_other() -> None:
    mask = disc(*HW, 20, 20, 8)
    other = [annotation_of(mask, 1, 7, score=0.9)]
    score = score_image(1, other, _entries([mask]))
    assert score.right_50 == 0 and score.aji == 0


def test_empty_images() -> None:
    nothing = score_image(1, [], [])
    assert nothing == ImageScore(1, 0, 0, 0, 0, 1.0, (), ())
    row = summarise([nothing])
    assert row["F1_50"] == row["count_ratio"] == UNDEFINED and row["count_MAE"] == 0
    assert set(summarise([]).values()) == {UNDEFINED}
    mask = [disc(*HW, 20, 20, 8)]
    assert score_image(1, _entries(mask), []).aji == score_image(1, [], _entries(mask)).aji == 0


def test_counts_are_of_each_image() -> None:
    def score(labelled: int, found: int) -> ImageScore:
        return ImageScore(1, labelled, found, 0, 0, 0.0, (), ())

    row = summarise([score(10, 7), score(10, 13)])
    assert row["count_MAE"] == 3 and row["count_ratio"] == 1


def test_the_threshold_and_the_images_of_a_split() -> None:
    masks = [disc(*HW, 20, 20, 8), disc(*HW, 20, 60, 8)]
    objects = _entries(masks)
    truth = {
        "images": [{"id": i, "height": HW[0], "width": HW[1]} for i in (2, 1)],
        "categories": [{"id": 3, "name": "disc"}],
        "annotations": [{**e, "id": i, "iscrowd": 0} for i, e in enumerate(objects)],
    }
    first, second = score_images(truth, _entries(masks), 0.985)
    assert (first.image_id, first.labelled, first.found) == (2, 0, 0)
    assert (second.image_id, second.labelled, second.found, second.right_50) == (1, 2, 1, 1)
    assert score_images(truth, _entries(masks), 0.98)[1].found == 2


def test_classes_that_are_not_labelled_do_not_count() -> None:
    mask = disc(*HW, 20, 20, 8)
    truth = {
        "images": [{"id": 1, "height": HW[0], "width": HW[1], "neg_category_ids": []}],
        "categories": [{"id": 3, "name": "disc"}, {"id": 7, "name": "box"}],
        "annotations": [{**_entries([mask])[0], "id": 1, "iscrowd": 0}],
    }
    results = [*_entries([mask]), annotation_of(disc(*HW, 40, 60, 8), 1, 7, score=0.9)]
    assert score_images(truth, results, 0.0)[0].found == 1


def test_a_mask_that_loads_as_bytes_or_text() -> None:
    mask = disc(*HW, 20, 20, 8)
    rle = coco_mask.encode(np.asfortranarray(mask))
    entry = {"category_id": 3, "score": 0.5, "segmentation": rle}
    assert score_image(1, [entry], _entries([mask])).aji == 1
