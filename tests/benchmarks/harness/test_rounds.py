from __future__ import annotations

import time

import pytest

from benchmarks.harness.rounds import (
    Samples,
    StageClock,
    ratio_of,
    repeat,
    take_turns,
    time_once,
)


def test_variants_take_turns_and_the_order_is_reversed_every_other_round() -> None:
    calls: list[str] = []

    def variant(name: str) -> dict[str, object]:
        calls.append(name)
        return {"cost": 10.0 * len(calls), "text": "left out", "list": [1]}

    told: list[str] = []
    variants = {"a": lambda: variant("a"), "b": lambda: variant("b")}
    samples = take_turns(variants, rounds=2, tell=told.append)
    assert calls == ["b", "a", "a", "b", "b", "a"]  # the first round warms up
    assert told[:3] == ["round -1: b", "round -1: a", "round 0: a"]
    assert samples.values == {"a": {"cost": [30, 60]}, "b": {"cost": [40, 50]}}
    assert samples.median("a", "cost") == 45
    assert samples.medians("b") == {"cost": 45}


def test_ratios_are_taken_round_by_round() -> None:
    samples = Samples({"a": {"s": [2.0, 20.0, 300.0]}, "b": {"s": [1.0, 10.0, 100.0]}})
    ratio = samples.ratio("a", "b", "s")
    assert (ratio.median, ratio.low, ratio.high, ratio.q1, ratio.q3) == (2, 2, 3, 2, 2.5)
    assert str(ratio) == "2 (2-3)"


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0, 2.0]), ([], [])])
def test_ratios_need_equally_many_rounds(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match=f"{len(a)} rounds of the one and {len(b)}"):
        ratio_of(a, b)


def test_waiting_takes_wall_time_and_no_cpu_time() -> None:
    costs = time_once(lambda: time.sleep(0.2))
    assert costs["wall_s"] >= 0.2 and costs["cpu_s"] < 0.1
    clock = StageClock()
    time.sleep(0.1)
    clock.lap("a")
    clock.lap("b")
    assert clock.costs["a_wall_s"] >= 0.1 > clock.costs["b_wall_s"]


def test_calls_are_repeated_for_a_time_within_their_bounds() -> None:
    calls: list[int] = []
    assert len(repeat(lambda: calls.append(1), least=4)) == 4
    assert len(calls) == 5  # the first warms up
    assert len(repeat(lambda: None, seconds=60, most=7)) == 7
