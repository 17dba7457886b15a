"""The map of scores: increasing, exact at its points, and what the data say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.calibration import (
    calibration_error,
    fit_calibration,
    group_scores,
    to_network,
    to_reported,
)
from pipeline.model_config import Calibration, MaskNms, PostprocessSpec
from pipeline.postprocess import postprocess
from pipeline.types import Candidates, Prepared, Tile, Window


def _draw(seed: int, power: float, count: int = 4000) -> tuple[list[float], list[bool]]:
    """Scores of a network of which the share score ** power is right."""
    rng = np.random.default_rng(seed)
    scores = rng.random(count)
    return scores.tolist(), (rng.random(count) < scores**power).tolist()


@pytest.mark.parametrize("power", [0.3, 1.0, 3.0])
def test_calibrated_scores_are_the_share_that_is_right(power: float) -> None:
    fitted = fit_calibration(*_draw(0, power))
    scores, right = _draw(1, power)
    reported = [to_reported(fitted, score) for score in scores]
    assert calibration_error(group_scores(reported, right)) < 0.04
    if power != 1:
        assert calibration_error(group_scores(scores, right)) > 0.15


@pytest.mark.parametrize(
    ("scores", "right"),
    [
        ([0.5], [True]),
        ([0.5], [False]),
        ([0.0, 1.0], [False, True]),
        ([1.0, 1.0, 0.0], [False, False, True]),
        ([0.049999, 0.050001, 0.1], [True, False, False]),
        _draw(3, 1.0, 40),
    ],
)
def test_any_data_give_an_increasing_map_that_can_be_inverted(
    scores: list[float], right: list[bool]
) -> None:
    fitted = fit_calibration(scores, right)
    values = np.linspace(0, 1, 501).tolist()
    reported = [to_reported(fitted, value) for value in values]
    assert all(a < b for a, b in itertools.pairwise(reported))
    assert (reported[0], reported[-1]) == (0, 1)
    np.testing.assert_allclose([to_network(fitted, value) for value in reported], values, atol=1e-6)


def test_without_a_map_scores_are_the_networks() -> None:
    assert to_reported(None, 0.3) == to_network(None, 0.3) == 0.3


@pytest.mark.parametrize(("scores", "right"), [([], []), ([0.5], []), ([0.5], [True, True])])
def test_nothing_to_fit_is_an_error(scores: list[float], right: list[bool]) -> None:
    with pytest.raises(ValueError, match="cannot be calibrated"):
        fit_calibration(scores, right)


@pytest.mark.parametrize(
    ("network", "reported", "reason"),
    [
        ((0.0, 1.0), (0.0, 0.5, 1.0), "2 scores are mapped to 3"),
        ((0.0, 0.6, 0.5, 1.0), (0.0, 0.2, 0.3, 1.0), "network .* does not rise"),
        ((0.0, 0.5, 1.0), (0.0, 0.0, 1.0), "reported .* does not rise"),
        ((0.0, 0.9), (0.0, 1.0), "network .* does not rise from 0 to 1"),
    ],
)
def test_a_map_that_does_not_rise_from_0_to_1_is_refused(
    network: tuple[float, ...], reported: tuple[float, ...], reason: str
) -> None:
    with pytest.raises(ValidationError, match=reason):
        Calibration(network=network, reported=reported)


def test_answers_and_thresholds_are_calibrated() -> None:
    tile = Tile(np.zeros((32, 32, 3), np.uint8), (32, 32), Window(0, 0, 32, 32))
    masks = np.zeros((3, 8, 8), np.float32)
    for number in range(3):
        masks[number, :, 2 * number] = 1
    candidates = Candidates(np.array([0.75, 0.5, 0.25], np.float32), np.zeros(3, np.int64), masks)
    spec = PostprocessSpec(nms=MaskNms(), score_threshold=0.85)
    calibration = Calibration(network=(0, 0.5, 1), reported=(0, 0.8, 1))

    def find(score_threshold: float | None = None) -> list[float]:
        found = postprocess(
            Prepared((32, 32), (tile,)),
            [candidates],
            spec,
            score_threshold=score_threshold,
            calibration=calibration,
        ).instances
        return [instance.score for instance in found]

    assert find(0.0) == pytest.approx([0.9, 0.8, 0.4])
    assert find() == pytest.approx([0.9])
    assert find(0.8) == pytest.approx([0.9, 0.8])
    assert find(0.81) == pytest.approx([0.9])
    assert find(0.41) == pytest.approx([0.9, 0.8])
