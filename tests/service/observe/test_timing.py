from __future__ import annotations

import pytest

from service.observe.timing import Interval, attribute_time, measure_union, merge_intervals


@pytest.mark.parametrize(
    ("intervals", "covered"),
    [
        ([], 0),
        ([(1, 3)], 2),
        ([(1, 3), (5, 6)], 3),
        ([(5, 6), (1, 3), (2, 4)], 4),
        ([(1, 10), (2, 3), (4, 5)], 9),
        ([(1, 2), (2, 3)], 2),
    ],
)
def test_overlapping_time_counts_once(intervals: list[Interval], covered: float) -> None:
    assert measure_union(intervals) == covered


def test_every_moment_is_attributed_to_one_stage() -> None:
    timing = attribute_time(
        (0, 20),
        decode=[(1, 3)],
        infer=[(5, 8), (8, 11)],
        postprocess=[(8, 9), (11, 13), (15, 16)],
        encode=[(16, 18)],
    )
    assert (timing.decode, timing.infer, timing.postprocess, timing.encode) == (2, 6, 3, 2)
    assert timing.queue == 7
    assert timing.total == 20


def test_adjacent_and_overlapping_intervals_are_merged() -> None:
    assert merge_intervals([(5, 6), (1, 3), (3, 4), (2, 3)]) == [(1, 4), (5, 6)]
    assert merge_intervals([(1, 9), (2, 3)]) == [(1, 9)]
