"""Both NMS against brute force and against what the published implementation computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.nms import mask_nms, matrix_nms, pairwise_iou
from pipeline.types import Bool, Float32, Int64

PARITY = Path(__file__).parents[1] / "data" / "parity" / "matrix_nms.npz"


def _random_masks(count: int, classes: int, seed: int) -> tuple[Float32, Int64, Bool]:
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, 12, 15), bool)
    for mask in masks:
        y, x = rng.integers(0, 9, 2)
        mask[y : y + rng.integers(0, 8), x : x + rng.integers(0, 8)] = True
    scores = np.sort(rng.random(count).astype(np.float32))[::-1]
    return scores, rng.integers(0, classes, count), masks


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 0.0


def _brute_force_matrix(
    scores: Float32, labels: Int64, masks: Bool, kernel: str, sigma: float
) -> Float32:
    def decay(iou: float) -> float:
        return float(np.exp(-sigma * iou**2)) if kernel == "gaussian" else 1 - iou

    out = []
    for j in range(len(scores)):
        factors = [1.0]
        for i in range(j):
            if labels[i] != labels[j]:
                continue
            worst = max(
                [_iou(masks[k], masks[i]) for k in range(i) if labels[k] == labels[i]] + [0]
            )
            if worst < 1:
                factors.append(decay(_iou(masks[i], masks[j])) / decay(worst))
        out.append(scores[j] * min(factors))
    return np.array(out)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 25), st.integers(1, 3), st.integers(0, 10_000))
def test_mask_nms_equals_brute_force(count: int, classes: int, seed: int) -> None:
    scores, labels, masks = _random_masks(count, classes, seed)
    kept: list[int] = []
    for j in range(count):
        if all(labels[i] != labels[j] or _iou(masks[i], masks[j]) <= 0.5 for i in kept):
            kept.append(j)
    assert mask_nms(scores, labels, masks, iou_threshold=0.5).tolist() == kept


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
def test_matrix_nms_equals_brute_force(kernel: Literal["gaussian", "linear"]) -> None:
    for seed in range(10):
        scores, labels, masks = _random_masks(20, 2, seed)
        # identical masks make the linear kernel divide by zero; they have their own test
        keep = [i for i in range(20) if all(_iou(masks[i], masks[j]) < 1 for j in range(i))]
        scores, labels, masks = scores[keep], labels[keep], masks[keep]
        expected = _brute_force_matrix(scores, labels, masks, kernel, 2.0)
        got = matrix_nms(scores, labels, masks, kernel=kernel, sigma=2.0)
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-7)


def test_matrix_nms_equals_the_published_implementation() -> None:
    data = np.load(PARITY)
    assert len(data["configs"])
    for index, text in enumerate(data["configs"]):
        config = json.loads(str(text))
        order = np.argsort(-data["scores"], kind="stable")[: config.get("nms_pre", 40)]
        scores = matrix_nms(
            data["scores"][order],
            data["labels"][order],
            data["masks"][order],
            kernel=config["kernel"],
            sigma=config.get("sigma", 2.0),
        )
        kept = np.flatnonzero(scores >= config.get("filter_thr", -1))
        kept = kept[np.argsort(-scores[kept], kind="stable")][: config.get("max_num", 40)]
        expected = data[f"out{index}_scores"]
        np.testing.assert_allclose(scores[kept], expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(order[kept], data[f"out{index}_keep_inds"])


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
def test_identical_masks_leave_one(kernel: Literal["gaussian", "linear"]) -> None:
    masks = np.ones((4, 5, 5), bool)
    scores = np.array([0.9, 0.8, 0.7, 0.6], np.float32)
    got = matrix_nms(scores, np.zeros(4, np.int64), masks, kernel=kernel)
    assert got[0] == scores[0]
    assert np.isfinite(got).all()
    assert (got[1:] <= scores[1:] * np.exp(-2.0) + 1e-6).all()


def test_nothing_in_nothing_out() -> None:
    none = np.zeros(0, np.float32), np.zeros(0, np.int64), np.zeros((0, 4, 4), bool)
    assert matrix_nms(*none).shape == (0,)
    assert mask_nms(*none).shape == (0,)


def test_empty_masks_overlap_nothing() -> None:
    assert pairwise_iou(np.zeros((2, 3, 3), bool)).max() == 0


@pytest.mark.parametrize("shape", [(1, 1), (31, 33), (32, 64), (70, 97)])
def test_blocks_make_no_difference(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape[0])
    masks = np.zeros((12, *shape), np.bool_)
    for mask in masks:
        y, x = rng.integers(0, shape[0]), rng.integers(0, shape[1])
        mask[y : y + rng.integers(1, 60), x : x + rng.integers(1, 60)] = True
    expected = [[_iou(a, b) for b in masks] for a in masks]
    np.testing.assert_allclose(pairwise_iou(masks), expected, rtol=1e-6)
