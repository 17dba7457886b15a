from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from pipeline.answer_match import compare_instances


def instance(
    box: tuple[int, int, int, int], score: float = 0.9, category: int = 1, side: int = 40
) -> dict[str, Any]:
    x, y, width, height = box
    mask = np.zeros((side, side), np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    rle = coco_mask.encode(mask)
    segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
    return {"category_id": category, "score": score, "segmentation": segmentation}


def test_the_same_answers_agree() -> None:
    answer = [instance((0, 0, 10, 10)), instance((20, 20, 5, 5))]
    found = compare_instances(answer, answer[::-1])
    assert (found.ious, found.unmatched, found.quality) == ((1.0, 1.0), (0, 0), 1.0)
    assert found.score_differences == (0.0, 0.0)


def test_no_instances() -> None:
    assert compare_instances([], []).quality == 1.0
    one = [instance((0, 0, 4, 4))]
    assert compare_instances(one, []).unmatched == (1, 0)
    assert compare_instances([], one).unmatched == (0, 1)
    assert compare_instances([], one).quality == 0.0


def test_iou_and_scores_are_those_of_the_pair() -> None:
    first, second = instance((0, 0, 10, 10), 0.5), instance((0, 0, 10, 8), 0.75)
    found = compare_instances([first], [second])
    assert found.ious == pytest.approx((0.8,))
    assert found.score_differences == pytest.approx((0.25,))
    assert found.quality == pytest.approx(0.8)


@pytest.mark.parametrize(("height", "matches"), [(5, 0), (6, 1)])
def test_a_pair_needs_more_than_half(height: int, matches: int) -> None:
    found = compare_instances([instance((0, 0, 10, 10))], [instance((0, 0, 10, height))])
    assert len(found.ious) == matches
    assert found.unmatched == (1 - matches, 1 - matches)


def test_classes_are_not_mixed() -> None:
    box = (0, 0, 10, 10)
    found = compare_instances([instance(box, category=1)], [instance(box, category=2)])
    assert found.unmatched == (1, 1)


def test_each_instance_has_one_partner_and_the_best_pair_comes_first() -> None:
    first = [instance((0, 0, 10, 10))]
    second = [instance((0, 0, 10, 7)), instance((0, 0, 10, 9)), instance((30, 30, 5, 5))]
    found = compare_instances(first, second)
    assert found.ious == pytest.approx((0.9,))
    assert found.unmatched == (0, 2)
    assert found.quality == pytest.approx(0.9 / 2)


def test_masks_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="different sizes"):
        compare_instances([instance((0, 0, 4, 4))], [instance((0, 0, 4, 4), side=41)])
    with pytest.raises(ValueError, match="different sizes"):
        compare_instances([instance((0, 0, 4, 4)), instance((0, 0, 4, 4), side=41)], [])
