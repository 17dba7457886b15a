from __future__ import annotations

import numpy as np
import pytest

from export.agreement import INT8, TYPED, Agreement, check_thresholds, compare_graphs
from export.errors import ParityError
from export.parity import Case
from pipeline.types import Candidates
from tests.support.typed_graph import build_graph, feeds_of


def squares(count: int = 5, shift: int = 0) -> Candidates:
    """Masks of 8x8 px in a row, scores 0.9, 0.8, ..., labels alternately 0 and 1."""
    masks = np.zeros((count, 16, 128), np.float32)
    for index, mask in enumerate(masks):
        start = index * 20 + shift
        mask[4:12, start : start + 8] = 0.9
    scores = (0.9 - 0.1 * np.arange(count)).astype(np.float32)
    return Candidates(scores, np.arange(count) % 2, masks)


def compared(expected: Candidates, found: Candidates, least: float = 0.05) -> Agreement:
    agreement = Agreement()
    agreement.add(expected, found, least)
    return agreement


def test_equal_candidates_agree() -> None:
    assert compared(squares(), squares()).summarise() == {
        "candidates": 10,
        "unmatched": 0,
        "matched_share": 1.0,
        "mean_mask_iou": 1.0,
        "min_mask_iou": 1.0,
        "mean_score_difference": 0.0,
        "max_score_difference": 0.0,
    }


def test_shifted_masks_match_and_their_iou_is_measured() -> None:
    numbers = compared(squares(), squares(shift=1)).summarise()
    assert numbers["unmatched"] == 0
    assert numbers["mean_mask_iou"] == pytest.approx(56 / 72)


def test_masks_with_iou_below_half_do_not_match() -> None:
    agreement = compared(squares(), squares(shift=4))
    assert (agreement.candidates, agreement.unmatched, agreement.ious) == (10, 10, [])
    numbers = agreement.summarise()
    assert (numbers["matched_share"], numbers["mean_mask_iou"]) == (0, 0)
    assert check_thresholds(numbers, None, INT8)["passed"] is False


def test_no_candidates_is_an_error() -> None:
    with pytest.raises(ParityError, match="no candidate was found on the test images"):
        compared(squares(0), squares(0)).summarise()
    assert compared(squares(2), squares(0)).unmatched == 2
    assert compared(squares(0), squares(2)).unmatched == 2


def test_candidates_of_different_labels_do_not_match() -> None:
    found = squares()
    found.labels[2] = 1
    assert compared(squares(), found).unmatched == 2


def test_of_two_equal_masks_the_one_with_the_closer_score_matches() -> None:
    expected = squares(1)
    masks = np.repeat(expected.mask_probs, 2, axis=0)
    found = Candidates(np.array([0.95, 0.89], np.float32), np.zeros(2, np.int64), masks)
    agreement = compared(expected, found)
    assert agreement.score_differences == [pytest.approx(0.01, abs=1e-6)]
    assert agreement.unmatched == 1


def test_low_scores_only_count_if_their_match_has_a_high_score() -> None:
    one, other = squares(3), squares(3)
    one.scores[:] = 0.9, 0.06, 0.04
    other.scores[:] = 0.9, 0.04, 0.03
    agreement = compared(one, other)
    assert (agreement.candidates, agreement.unmatched) == (4, 0)
    few = Candidates(other.scores[:1], other.labels[:1], other.mask_probs[:1])
    assert compared(one, few).unmatched == 1


def test_different_mask_sizes_are_an_error() -> None:
    other = Candidates(np.ones(1, np.float32), np.zeros(1, np.int64), np.zeros((1, 8, 8), "f4"))
    with pytest.raises(ParityError, match=r"\(16, 128\) in float32 and \(8, 8\)"):
        compared(squares(), other)


def test_every_violated_threshold_is_named() -> None:
    good = compared(squares(), squares()).summarise()
    assert check_thresholds(good, None, TYPED)["passed"] is True
    assert check_thresholds(good, {"fp32": 0.485, "variant": 0.483}, TYPED)["passed"] is True
    bad = {**good, "mean_mask_iou": 0.98, "matched_share": 0.5, "mean_score_difference": 0.1}
    verdict = check_thresholds(bad, {"fp32": 0.485, "variant": 0.4745}, INT8)
    assert verdict["passed"] is False
    assert verdict["failures"] == [
        "matched share 0.5000, must be >= 0.9",
        "mean score difference 0.1000, must be <= 0.02",
        "AP loss 0.0105, must be <= 0.01",
    ]


def test_nan_scores_do_not_pass() -> None:
    good = compared(squares(), squares()).summarise()
    assert check_thresholds({**good, "mean_mask_iou": float("nan")}, None, INT8)["passed"] is False


def test_a_graph_agrees_with_itself_and_a_broken_one_is_an_error() -> None:
    feeds = feeds_of((16, 32))
    cases = [Case("noise", feeds["images"], feeds["valid_hw"])]
    numbers = compare_graphs(build_graph(), build_graph(), cases, 0.0)
    assert numbers["matched_share"] == 1 and numbers["mean_mask_iou"] == 1
    with pytest.raises(ParityError, match="cannot run the variant"):
        compare_graphs(build_graph(), b"no graph", cases, 0.0)
