"""The comparison of points NMS accepts ties and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.parity import TIE, check_points_nms
from training.model.solo import points_nms

TOLERANCE = 1e-5
CELLS = ("above", "left", "diagonal")


def pair(where: str, margin: float) -> tuple[Tensor, Tensor]:
    """Two [1, 1, 4, 4] maps whose cell (2, 2) is above its greatest neighbour by +-`margin`."""
    higher = torch.full((1, 1, 4, 4), 0.01, dtype=torch.float64)
    row, column = {"above": (1, 2), "left": (2, 1), "diagonal": (1, 1)}[where]
    higher[0, 0, row, column] = 0.5
    lower = higher.clone()
    higher[0, 0, 2, 2] = 0.5 + margin
    lower[0, 0, 2, 2] = 0.5 - margin
    return higher, lower


def compare(ours: Tensor, theirs: Tensor) -> np.ndarray:
    return check_points_nms(ours, points_nms(ours), points_nms(theirs).numpy(), TOLERANCE)


@pytest.mark.parametrize("where", CELLS)
def test_a_tie_may_go_either_way(where: str) -> None:
    higher, lower = pair(where, 0.9 * TIE)
    assert np.argwhere(compare(higher, lower)).tolist() == [[0, 0, 2, 2]]
    assert np.argwhere(compare(lower, higher)).tolist() == [[0, 0, 2, 2]]
    assert not compare(higher, higher).any()


@pytest.mark.parametrize("where", CELLS)
def test_a_difference_above_the_bound_is_refused(where: str) -> None:
    higher, lower = pair(where, 1.1 * TIE)
    for ours, theirs in ((higher, lower), (lower, higher)):
        with pytest.raises(AssertionError, match=r"not tied.*\[\[0, 0, 2, 2\]\]"):
            compare(ours, theirs)


def test_the_value_of_a_tied_entry_is_compared_too() -> None:
    higher, lower = pair("left", 0.9 * TIE)
    stored = points_nms(higher).numpy()
    stored[0, 0, 2, 2] += 2 * TOLERANCE
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_points_nms(lower, points_nms(lower), stored, TOLERANCE)


def test_the_value_of_any_other_entry_is_compared() -> None:
    ours, _ = pair("left", 0.9 * TIE)
    stored = points_nms(ours).numpy()
    stored[0, 0, 0, 0] += 2 * TOLERANCE
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_points_nms(ours, points_nms(ours), stored, TOLERANCE)
