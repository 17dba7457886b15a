"""Variants measured in turns, and the statistics of their rounds. NumPy only: mmdetection's
interpreter imports it too."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Costs = Mapping[str, float]
"""One measurement: numbers by name."""


class StageClock:
    """CPU and wall seconds of this process, stage by stage.

    Attributes:
        costs: `STAGE_cpu_s` and `STAGE_wall_s` of each lap.
    """

    def __init__(self) -> None:
        self.costs: dict[str, float] = {}
        self._began = time.process_time(), time.perf_counter()

    def lap(self, stage: str) -> None:
        """Ends a stage; the next begins."""
        now = time.process_time(), time.perf_counter()
        self.costs[f"{stage}_cpu_s"] = now[0] - self._began[0]
        self.costs[f"{stage}_wall_s"] = now[1] - self._began[1]
        self._began = now


def time_once(step: Callable[[], object]) -> dict[str, float]:
    """`cpu_s` and `wall_s` of one call, of this process with all its threads."""
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    return {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}


def timed(step: Callable[[], object]) -> Callable[[], dict[str, float]]:
    """A variant for `take_turns` that times a step with `time_once`."""
    return lambda: time_once(step)


def repeat(
    step: Callable[[], object], *, seconds: float = 0, least: int = 3, most: int = 200
) -> list[float]:
    """Wall seconds of calls one after another, after one that warms up.

    Args:
        step: What is called; must wait for a device itself.
        seconds: No call begins later than this, once there are `least`.
        least: Calls at least.
        most: Calls at most.
    """
    step()
    laps: list[float] = []
    end_s = time.perf_counter() + seconds
    while len(laps) < least or (len(laps) < most and time.perf_counter() < end_s):
        began_s = time.perf_counter()
        step()
        laps.append(time.perf_counter() - began_s)
    return laps


@dataclass(frozen=True)
class Ratio:
    """One variant's numbers over another's, round by round: median, range and quartiles."""

    median: float
    low: float
    high: float
    q1: float
    q3: float

    def __str__(self) -> str:
        """Median, and the range in brackets."""
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"


def ratio_of(a: Sequence[float], b: Sequence[float]) -> Ratio:
    """a over b, one number for each round.

    Raises:
        ValueError: They are not equally many, or none.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} rounds of the one and {len(b)} of the other")
    middle, low, high, q1, q3 = np.percentile(np.divide(a, b), [50, 0, 100, 25, 75]).tolist()
    return Ratio(middle, low, high, q1, q3)


@dataclass
class Samples:
    """Measurements by variant and name, one number for each round.

    Attributes:
        values: [variant][name][round].
    """

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, variant: str, costs: Mapping[str, Any]) -> None:
        """Adds one round; what is not a number is left out."""
        row = self.values.setdefault(variant, {})
        for name, value in costs.items():
            if isinstance(value, int | float):
                row.setdefault(name, []).append(float(value))

    def median(self, variant: str, name: str) -> float:
        """Over the rounds."""
        return float(np.median(self.values[variant][name]))

    def medians(self, variant: str) -> dict[str, float]:
        """All of a variant's numbers."""
        return {name: self.median(variant, name) for name in self.values[variant]}

    def ratio(self, variant: str, base: str, name: str) -> Ratio:
        """Of a number of two variants."""
        return ratio_of(self.values[variant][name], self.values[base][name])


def in_turn(names: Iterable[str], number: int) -> list[str]:
    """The variants in the order of a round: reversed in every other one."""
    return list(names)[:: -1 if number % 2 else 1]


def take_turns(
    variants: Mapping[str, Callable[[], Mapping[str, Any]]],
    rounds: int,
    *,
    warm_ups: int = 1,
    tell: Callable[[str], object] | None = None,
) -> Samples:
    """Measures all variants once in each round; every other round in the reverse order.

    Args:
        variants: Each measures once.
        rounds: That count.
        warm_ups: Rounds before them that do not count.
        tell: Called after each measurement.
    """
    samples = Samples({name: {} for name in variants})
    for number in range(-warm_ups, rounds):
        for name in in_turn(variants, number):
            costs = variants[name]()
            if number >= 0:
                samples.add(name, costs)
            if tell is not None:
                tell(f"round {number}: {name}")
    return samples


def answer_lines(answer: Callable[[str], Mapping[str, Any]]) -> None:
    """A child process's loop: answers each line of standard input with a line of JSON."""
    for line in sys.stdin:
        print(json.dumps(answer(line.strip())), flush=True)
