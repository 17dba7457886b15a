"""Matching of instances with objects."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest

from pipeline.mask_iou import measure_iou
from tests.support.tiny import annotation_of, disc
from training.matching import match, rank


def _entry(x: int, category_id: int = 3, score: float = 1.0) -> dict[str, Any]:
    return annotation_of(disc(40, 60, 20, x, 8), 1, category_id, score=score)


def test_the_best_instance_chooses_first_and_each_object_goes_once() -> None:
    iou = np.array([[0.6, 0.9], [0.0, 0.8], [0.7, 0.0], [0.9, 0.0]])
    assert match(iou, 0.5) == [1, None, 0, None]
    assert match(iou, 0.95) == [None] * 4
    assert match(np.array([[0.5]]), 0.5) == [0]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_match(shape: tuple[int, int]) -> None:
    assert match(np.zeros(shape), 0.5) == [None] * shape[0]


@pytest.mark.parametrize("seed", range(5))
def test_without_overlaps_no_other_matching_has_more_pairs(seed: int) -> None:
    """At most one IoU of a row or column is above 0.5 there."""
    rng = np.random.default_rng(seed)
    iou = rng.uniform(0, 0.5, (4, 5)) * (rng.uniform(size=(4, 5)) < 0.5)
    for row, column in enumerate(rng.permutation(5)[:4]):
        iou[row, column] = rng.uniform(0.3, 1)
    found = sum(j is not None for j in match(iou, 0.5))
    most = max(sum(iou[range(4), p] >= 0.5) for p in permutations(range(5), 4))
    assert found == most


def test_iou_of_masks_of_the_same_class() -> None:
    found, objects = [_entry(20), _entry(24), _entry(20, 7)], [_entry(20), _entry(50)]
    iou = measure_iou(found, objects)
    first, second = disc(40, 60, 20, 20, 8), disc(40, 60, 20, 24, 8)
    assert iou.tolist()[0] == [1.0, 0.0] and iou.tolist()[2] == [0.0, 0.0]
    assert iou[1, 0] == pytest.approx((first & second).sum() / (first | second).sum())
    assert measure_iou([], objects).shape == (0, 2) and measure_iou(found, []).shape == (3, 0)


def test_the_share_that_a_crowd_covers() -> None:
    crowd = annotation_of(disc(40, 60, 20, 20, 19), 1, 3)
    assert measure_iou([_entry(20), _entry(50)], [crowd], crowd=True).tolist() == [[1.0], [0.0]]


def test_ranking_keeps_the_order_of_equal_scores() -> None:
    entries = [_entry(10, score=0.5), _entry(20, score=0.9), _entry(30, score=0.5)]
    assert [e["bbox"][0] for e in rank(entries)] == [12, 2, 22]
