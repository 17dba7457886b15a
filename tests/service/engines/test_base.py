from __future__ import annotations

import numpy as np
import pytest

from service.engines.base import BackendError, split_batch


def build_output(batch: int, slots: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    scores = -np.sort(-rng.random((batch, slots), np.float32), axis=1)
    labels = rng.integers(0, 3, (batch, slots))
    return scores, labels, rng.random((batch, slots, 4, 6), np.float32)


def test_each_canvas_gets_its_rows_without_empty_slots() -> None:
    scores, labels, masks = build_output(2, 5)
    scores[0, 3:] = 0
    first, second = split_batch(scores, labels, masks)
    assert first.scores.tolist() == scores[0, :3].tolist()
    assert first.labels.tolist() == labels[0, :3].tolist()
    assert (first.mask_probs == masks[0, :3]).all()
    assert second.mask_probs.shape == (5, 4, 6)


def test_a_canvas_without_candidates_keeps_the_shape_of_its_masks() -> None:
    scores, labels, masks = build_output(1, 5)
    (empty,) = split_batch(np.zeros_like(scores), labels, masks)
    assert empty.mask_probs.shape == (0, 4, 6)


def test_results_own_their_memory() -> None:
    scores, labels, masks = build_output(2, 5)
    for result in split_batch(scores, labels, masks):
        assert not np.shares_memory(result.mask_probs, masks)


def test_shapes_that_do_not_fit_are_refused() -> None:
    scores, labels, masks = build_output(2, 5)
    for outputs in (
        (scores, labels[:, :4], masks),
        (scores, labels, masks[:, :4]),
        (scores, labels, masks[0]),
    ):
        with pytest.raises(BackendError, match="do not fit"):
            split_batch(*outputs)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused(value: float) -> None:
    scores, labels, masks = build_output(1, 5)
    scores[0, 2] = value
    with pytest.raises(BackendError, match="not finite"):
        split_batch(scores, labels, masks)
