"""Where the time of one image went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Interval = tuple[float, float]
"""Start and end, seconds of `time.monotonic`: an event loop's own time may count milliseconds only,
as uvloop's does, and then stages are longer than all of it."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one image; the stages add up to `total`."""

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
    """Gives every moment to one stage.

    While the engine has one tile of an image, another may be in post-processing: such a moment
    counts as `infer`. A moment in which nothing was done for the image is `queue`.

    Args:
        whole: From the request's body being there to the image's answer.
        decode: When the image was decoded.
        infer: When the engine had one of its tiles.
        postprocess: When its candidates were processed.
        encode: When its answer was written.
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
    """Seconds that at least one interval covers."""
    seconds, covered_s = 0.0, float("-inf")
    for start_s, end_s in sorted(intervals):
        if end_s > covered_s:
            seconds += end_s - (start_s if start_s > covered_s else covered_s)
            covered_s = end_s
    return seconds


def merge_intervals(intervals: Sequence[Interval]) -> list[Interval]:
    """The stretches that at least one interval covers, in their order."""
    merged: list[Interval] = []
    for start_s, end_s in sorted(intervals):
        if merged and start_s <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end_s, merged[-1][1]))
        else:
            merged.append((start_s, end_s))
    return merged
