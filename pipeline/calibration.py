"""Scores that say how often an instance is right: an increasing map of the network's own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.model_config import Calibration

MIN_SLOPE = 0.01
"""The map is nowhere flatter, so that the order of the scores stays."""
BIN = 0.05
"""Width of the groups of scores whose shares of right instances are fitted."""
Group = tuple[float, float, int]
"""Mean score, share of right instances, and number of instances."""


def to_reported(calibration: Calibration | None, score: float) -> float:
    """The score of an answer for a score of the network."""
    if calibration is None:
        return score
    return float(np.interp(score, calibration.network, calibration.reported))


def to_network(calibration: Calibration | None, score: float) -> float:
    """The network's score that is reported as this one."""
    if calibration is None:
        return score
    return float(np.interp(score, calibration.reported, calibration.network))


def group_scores(scores: Sequence[float], right: Sequence[bool]) -> list[Group]:
    """The reliability curve: a group for each `BIN` of scores that has instances."""
    values, verdicts = np.asarray(scores, np.float64), np.asarray(right, np.float64)
    bins = np.minimum((values / BIN).astype(np.int64), round(1 / BIN) - 1)
    return [
        (float(values[own].mean()), float(verdicts[own].mean()), int(own.sum()))
        for own in (bins == number for number in np.unique(bins))
    ]


def calibration_error(groups: Sequence[Group]) -> float:
    """Mean difference between score and share of right instances, over all instances."""
    total = sum(count for _, _, count in groups)
    return sum(abs(score - share) * count for score, share, count in groups) / total


def fit_calibration(scores: Sequence[float], right: Sequence[bool]) -> Calibration:
    """Isotonic regression of the reliability curve, from 0, 0 to 1, 1.

    Args:
        scores: The network's, 0..1, of all instances of a labelled split.
        right: Whether each instance is an object.

    Raises:
        ValueError: There is no instance, or the two differ in length.
    """
    if len(scores) == 0 or len(scores) != len(right):
        raise ValueError(f"{len(scores)} scores with {len(right)} verdicts cannot be calibrated")
    groups = group_scores(scores, right)
    network = [0.0, *(score for score, _, _ in groups), 1.0]
    shares = [0.0, *_isotonic(groups), 1.0]
    points = {
        round(x, 6): round(MIN_SLOPE * x + (1 - MIN_SLOPE) * y, 9)
        for x, y in zip(network, shares, strict=True)
        if x in (0.0, 1.0) or 1e-3 < x < 1 - 1e-3
    }
    points[0.0], points[1.0] = 0.0, 1.0
    return Calibration(network=tuple(points), reported=tuple(points.values()))


def _isotonic(groups: Sequence[Group]) -> list[float]:
    """The closest shares that do not fall: neighbours that would are given their mean."""
    pools: list[tuple[float, int, int]] = []  # share, instances, groups
    for _, share, count in groups:
        pool = share, count, 1
        while pools and pools[-1][0] > pool[0]:
            before = pools.pop()
            both = before[1] + pool[1]
            mean = (before[0] * before[1] + pool[0] * pool[1]) / both
            pool = mean, both, before[2] + pool[2]
        pools.append(pool)
    return [share for share, _, size in pools for _ in range(size)]
