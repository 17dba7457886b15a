from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.types import Tile, UInt8, Window
from service.engines.base import BackendError, collate, split_batch


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


@pytest.mark.parametrize("used", [[0, 1, 2], [1, 3, 4], [], [0, 1, 2, 3, 4]])
def test_results_own_their_memory(used: list[int]) -> None:
    scores, labels, masks = build_output(1, 5)
    scores[0, [slot for slot in range(5) if slot not in used]] = 0
    (result,) = split_batch(scores, labels, masks)
    outputs = (scores, labels, masks)
    results: tuple[NDArray[Any], ...] = (result.scores, result.labels, result.mask_probs)
    for output, kept in zip(outputs, results, strict=True):
        assert kept.dtype == output.dtype
        assert np.array_equal(kept, output[0, used])
        assert not np.shares_memory(kept, output)


def build_tile(image: UInt8, valid_hw: tuple[int, int]) -> Tile:
    return Tile(image, valid_hw, Window(0, 0, *valid_hw))


def test_one_canvas_is_not_copied_and_several_are_stacked() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), np.uint8)
    tiles = [build_tile(picture[0], (4, 6)), build_tile(picture[1], (3, 5))]
    images, valid_hw = collate(tiles[:1])
    assert images.shape == (1, 4, 6, 3)
    assert np.shares_memory(images, picture)
    assert valid_hw.tolist() == [[4, 6]]
    images, valid_hw = collate(tiles)
    assert np.array_equal(images, picture)
    assert valid_hw.tolist() == [[4, 6], [3, 5]] and valid_hw.dtype == np.int64


def test_a_canvas_alone_is_contiguous() -> None:
    picture = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)[:, ::-1]
    images, _ = collate([build_tile(picture, (4, 6))])
    assert images.flags.c_contiguous
    assert np.array_equal(images[0], picture)


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
