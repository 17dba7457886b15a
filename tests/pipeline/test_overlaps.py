"""Disjoint masks: compared with the same rule on full-size masks."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from pipeline.overlaps import MIN_LEFT, MIN_PIECE, column_runs, resolve_overlaps
from pipeline.runs import BoxMask, build_instance
from pipeline.types import Detection

Mask = NDArray[np.bool_]


def _instance(mask: Mask, score: float = 0.5, label: int = 0) -> Detection:
    return build_instance(BoxMask(0, 0, mask), (mask.shape[0], mask.shape[1]), label, score)


def _decode(instance: Detection) -> Mask:
    return np.asarray(coco_mask.decode([instance.rle])[..., 0]).astype(np.bool_)


def _resolve_dense(masks: list[Mask]) -> list[tuple[int, Mask]]:
    """The rule on full-size masks; indices of those that are left, and what is left."""
    taken, kept = np.zeros(masks[0].shape, np.bool_), []
    for index, mask in enumerate(masks):
        left = mask & ~taken
        if left.sum() < mask.sum():
            count, labels = cv2.connectedComponents(left.astype(np.uint8), connectivity=8)
            for label in range(1, count):
                if (labels == label).sum() < MIN_PIECE * mask.sum():
                    left[labels == label] = False
            if left.sum() < MIN_LEFT * mask.sum():
                continue
        taken |= left
        kept.append((index, left))
    return kept


def _random_masks(rng: np.random.Generator, kind: str, image_hw: tuple[int, int]) -> list[Mask]:
    """Noise, blobs, or boxes that touch the borders; none is empty."""
    masks: list[Mask] = []
    rows, columns = np.mgrid[: image_hw[0], : image_hw[1]]
    for _ in range(int(rng.integers(2, 12))):
        y, x = rng.integers(0, image_hw[0]), rng.integers(0, image_hw[1])
        if kind == "noise":
            mask = rng.random(image_hw) < rng.uniform(0.05, 0.95)
        elif kind == "blobs":
            mask = np.hypot(rows - y, columns - x) < rng.uniform(1, 12)
            mask &= rng.random(image_hw) < rng.choice([0.7, 1.0])
        else:
            mask = np.zeros(image_hw, np.bool_)
            mask[y : y + rng.integers(1, 40), x : x + rng.integers(1, 40)] = True
            mask[:, : rng.integers(0, 3)] = True
        mask[y, x] = True
        masks.append(mask)
    return masks


@pytest.mark.parametrize("kind", ["noise", "blobs", "boxes"])
@pytest.mark.parametrize("image_hw", [(31, 37), (1, 50), (50, 1), (24, 24)])
@pytest.mark.parametrize("seed", range(8))
def test_equals_the_rule_on_full_size_masks(
    kind: str, image_hw: tuple[int, int], seed: int
) -> None:
    masks = _random_masks(np.random.default_rng(seed), kind, image_hw)
    instances = [_instance(m, 0.9 - 0.01 * n, label=n) for n, m in enumerate(masks)]
    resolved, expected = resolve_overlaps(instances), _resolve_dense(masks)
    assert [i.label for i in resolved] == [index for index, _ in expected]
    for instance, (index, left) in zip(resolved, expected, strict=True):
        assert instance == _instance(left, instances[index].score, index)
    total = np.sum([_decode(i) for i in resolved], axis=0)
    assert total.max() <= 1


def test_disjoint_and_touching_masks_are_the_same_objects() -> None:
    rows, columns = np.mgrid[:40, :40]
    instances = [_instance((columns // 10 == n) & (rows < 38)) for n in range(4)]
    resolved = resolve_overlaps(instances)
    assert len(resolved) == 4
    assert all(a is b for a, b in zip(resolved, instances, strict=True))


@pytest.mark.parametrize("count", [0, 1])
def test_none_and_one(count: int) -> None:
    instances = [_instance(np.ones((3, 3), np.bool_))] * count
    assert resolve_overlaps(instances) == instances


def test_equal_masks_leave_the_first() -> None:
    instances = [_instance(np.ones((7, 9), np.bool_), 0.9 - 0.1 * n) for n in range(3)]
    assert resolve_overlaps(instances) == instances[:1]


def test_what_a_dropped_instance_does_not_keep_goes_to_a_worse_one() -> None:
    best, middle, worst = (np.zeros((20, 40), np.bool_) for _ in range(3))
    best[:, :20] = middle[:, 10:25] = worst[:, 20:40] = True
    resolved = resolve_overlaps([_instance(best), _instance(middle), _instance(worst)])
    np.testing.assert_array_equal([_decode(i) for i in resolved], [best, worst])


def test_half_is_enough_and_a_pixel_less_is_not() -> None:
    best, other = np.zeros((10, 10), np.bool_), np.zeros((10, 10), np.bool_)
    best[:, :5] = other[:, 2:8] = True
    assert [i.area for i in resolve_overlaps([_instance(best), _instance(other)])] == [50, 30]
    best[0, 5] = True
    assert [i.area for i in resolve_overlaps([_instance(best), _instance(other)])] == [51]


def test_a_small_piece_behind_a_better_instance_goes() -> None:
    best, other = np.zeros((20, 60), np.bool_), np.zeros((20, 60), np.bool_)
    best[:, 30:35] = other[5:10, 10:37] = True
    (_, left) = resolve_overlaps([_instance(best), _instance(other)])
    assert left.bbox_xywh == (10, 5, 20, 5)


def test_an_instance_that_loses_nothing_keeps_its_small_pieces() -> None:
    speckled, other = np.zeros((20, 60), np.bool_), np.zeros((20, 60), np.bool_)
    speckled[2:12, 2:12] = speckled[15, 20] = other[10:, 40:] = True
    instances = [_instance(speckled), _instance(other)]
    assert resolve_overlaps(instances) == instances


def test_masks_of_a_very_large_image_are_not_decoded() -> None:
    """The full masks would take 7 TB."""
    hw = (60_000, 60_000)
    box = np.ones((50, 50), np.bool_)
    found = [build_instance(BoxMask(50_000, x, box), hw, 0, 0.5) for x in range(0, 20_000, 10)]
    resolved = resolve_overlaps(found)
    assert [i.bbox_xywh[0] for i in resolved] == [0, *range(50, 20_011, 30)]


def test_no_run_spans_two_columns() -> None:
    mask = np.zeros((5, 4), np.bool_)
    mask[2:, 1] = mask[:, 2] = mask[:2, 3] = True
    assert column_runs(_instance(mask)).tolist() == [[7, 10], [10, 15], [15, 17]]
    rle = coco_mask.encode(np.zeros((5, 4), np.uint8, "F"))
    assert column_runs(Detection(0, 0.5, rle, (0, 0, 0, 0), 0)).shape == (0, 2)
