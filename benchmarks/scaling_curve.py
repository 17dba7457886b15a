"""A cost over what it depends on, and where it bends.

The exponent of a curve is the slope of its logarithms: 0 where the cost stays, 1 where it grows in
proportion, 2 where it grows with the square.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

LEAST_CHANGE = 0.5
"""Of the exponent; less is not called a bend."""


class Bend(NamedTuple):
    """Where a curve bends: its exponents from the first point to this and from this to the last."""

    at: float
    before: float
    after: float


@dataclass(frozen=True)
class Plan:
    """What is measured for a curve.

    Attributes:
        name: Of the curve.
        unit: Of its horizontal axis.
        points: By place on that axis, what measures there once: each cost by its name.
    """

    name: str
    unit: str
    points: Mapping[float, Callable[[], Mapping[str, float]]]


@dataclass
class Curve:
    """Measured costs.

    Attributes:
        name: Of the curve.
        unit: Of its horizontal axis.
        places: On that axis, ascending.
        rounds: By cost, [places][rounds].
    """

    name: str
    unit: str
    places: list[float]
    rounds: dict[str, list[list[float]]] = field(default_factory=dict)

    def medians(self, cost: str) -> list[float]:
        """One number a place."""
        return [float(np.median(values)) for values in self.rounds[cost]]

    def find_bends(self) -> dict[str, Bend]:
        """By cost, where it bends, if it does."""
        found = {cost: find_bend(self.places, self.medians(cost)) for cost in self.rounds}
        return {cost: bend for cost, bend in found.items() if bend is not None}

    def rows(self) -> list[dict[str, str]]:
        """A table: medians, and quartiles where there are several rounds."""
        return [
            {self.unit: f"{place:g}"}
            | {cost: _show(rounds[index]) for cost, rounds in self.rounds.items()}
            for index, place in enumerate(self.places)
        ]


def measure(plan: Plan, rounds: int, warm_ups: int = 1) -> Curve:
    """Measures all points in turns.

    Args:
        plan: What to measure.
        rounds: Through all points.
        warm_ups: Rounds before, which do not count.
    """
    places = sorted(plan.points)
    curve = Curve(plan.name, plan.unit, places)
    for number in range(-warm_ups, rounds):
        for index, place in enumerate(places):
            costs = plan.points[place]()
            for cost, value in costs.items() if number >= 0 else ():
                curve.rounds.setdefault(cost, [[] for _ in places])[index].append(value)
    return curve


def find_bend(places: Sequence[float], costs: Sequence[float]) -> Bend | None:
    """The inner point before and after which the exponents differ most, if by `LEAST_CHANGE`.

    None, too, if a cost is not above 0.
    """
    if min(costs) <= 0:
        return None

    def exponent(first: int, last: int) -> float:
        return math.log(costs[last] / costs[first]) / math.log(places[last] / places[first])

    end = len(places) - 1
    bends = [Bend(places[i], exponent(0, i), exponent(i, end)) for i in range(1, end)]
    sharpest = max(bends, key=lambda bend: abs(bend.after - bend.before), default=None)
    if sharpest is None or abs(sharpest.after - sharpest.before) < LEAST_CHANGE:
        return None
    return sharpest


def _show(values: Sequence[float]) -> str:
    low, middle, high = (f"{value:.3g}" for value in np.percentile(values, [25, 50, 75]))
    return middle if len(values) == 1 else f"{middle} ({low}..{high})"
