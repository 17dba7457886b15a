"""Time of one image, attributed to stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Interval = tuple[float, float]
"""Start and end, seconds of `time.monotonic`. Not of `loop.time()`: uvloop's has a resolution of
1 ms, so stages could appear longer than the whole."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds per stage of one image; the stages add up to `total`."""

    decode: float
    queue: float
    infer: float
    postprocess: float
    encode: float
    total: float


NO_TIME = Timing(decode=0, queue=0, infer=0, postprocess=0, encode=0, total=0)


def attribute_time(
    whole: Interval,
    *,
    decode: Sequence[Interval],
    infer: Sequence[Interval],
    postprocess: Sequence[Interval],
    encode: Sequence[Interval],
) -> Timing:
    """Attributes every moment of `whole` to exactly one stage.

    Stages of different tiles overlap; where they do, the earlier parameter takes precedence, in
    the order decode, infer, postprocess, encode. Time in no stage is `queue`.

    Args:
        whole: From the end of the request's body to the image's result.
        decode: Intervals of decoding and preprocessing.
        infer: Intervals in which the engine ran a canvas of the image.
        postprocess: Intervals of postprocessing.
        encode: Intervals of encoding the result.
    """
    seconds: list[float] = []
    counted: list[Interval] = []
    covered = 0.0
    for intervals in (decode, infer, postprocess, encode):
        counted += intervals
        grown = measure_union(counted)
        seconds.append(grown - covered)
        covered = grown
    total = whole[1] - whole[0]
    return Timing(
        decode=seconds[0],
        queue=max(0.0, total - covered),
        infer=seconds[1],
        postprocess=seconds[2],
        encode=seconds[3],
        total=total,
    )


def measure_union(intervals: Sequence[Interval]) -> float:
    """Total seconds covered by at least one interval."""
    seconds, covered_s = 0.0, float("-inf")
    for start_s, end_s in sorted(intervals):
        if end_s > covered_s:
            seconds += end_s - (start_s if start_s > covered_s else covered_s)
            covered_s = end_s
    return seconds


def merge_intervals(intervals: Sequence[Interval]) -> list[Interval]:
    """The union of intervals, as disjoint intervals in ascending order."""
    merged: list[Interval] = []
    for start_s, end_s in sorted(intervals):
        if merged and start_s <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end_s, merged[-1][1]))
        else:
            merged.append((start_s, end_s))
    return merged
