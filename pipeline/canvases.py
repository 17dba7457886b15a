"""Which canvases a model's images can have, and the few shape ranges that an engine is built for.

Symbols: H W canvas.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipeline.model_config import InputSpec, KeepRatioResize, TileResize

Canvas = tuple[int, int]
"""Height and width, px."""

AREA_SPREAD = 1.5
"""Largest to smallest area of the canvases that share a bucket."""


@dataclass(frozen=True, order=True)
class Bucket:
    """A range of canvases that one optimisation profile serves.

    Attributes:
        min_hw, max_hw: Least and greatest height and width, each side by itself.
        opt_hw: The canvas that the engine is tuned for, one that does occur.
    """

    min_hw: Canvas
    opt_hw: Canvas
    max_hw: Canvas

    def holds(self, canvas: Canvas) -> bool:
        """Whether both sides lie in the range."""
        sides = zip(self.min_hw, canvas, self.max_hw, strict=True)
        return all(low <= side <= high for low, side, high in sides)


def list_canvases(spec: InputSpec) -> tuple[Canvas, ...]:
    """Every canvas that an image of any size can get, ascending.

    Tiles have one. Under the published rule either the short side reaches `short_side` and the
    long side is anything up to `long_side`, or the long side is `long_side` and the short side is
    anything up to `short_side`; both are then padded, and the image may lie or stand.
    """
    if isinstance(spec.resize, TileResize):
        return (spec.resize.canvas_hw,)
    lying = {_pad(short, long, spec.resize) for short, long in _sides(spec.resize)}
    return tuple(sorted(lying | {(width, height) for height, width in lying}))


def _sides(resize: KeepRatioResize) -> list[tuple[int, int]]:
    """Short and long side after the resize, before padding."""
    short_side, long_side = resize.short_side, resize.long_side
    reached = [(short_side, long) for long in range(short_side, long_side + 1)]
    bounded = [(short, long_side) for short in range(1, min(short_side, long_side) + 1)]
    return reached + bounded


def _pad(height: int, width: int, resize: KeepRatioResize) -> Canvas:
    multiple = resize.pad_multiple
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def cover_canvases(canvases: Collection[Canvas], max_buckets: int = 8) -> tuple[Bucket, ...]:
    """Few buckets that together hold every canvas.

    Lying and standing canvases are kept apart, for a range that holds both would also hold the
    square of their long side, and an engine's memory is that of its greatest shape. Within each,
    canvases of like area share a bucket; the smallest, which only very long images get, share the
    last one.

    Args:
        canvases: At least one.
        max_buckets: Most buckets; each costs time to build and memory. Two at least, unless all
            canvases lie or all stand.

    Raises:
        ValueError: There is no canvas, or `max_buckets` is too low.
    """
    groups = [
        sorted(group, key=lambda hw: (-hw[0] * hw[1], hw))
        for group in (
            {hw for hw in canvases if hw[0] <= hw[1]},
            {hw for hw in canvases if hw[0] > hw[1]},
        )
        if group
    ]
    if not groups or max_buckets < len(groups):
        raise ValueError(f"{max_buckets} buckets cannot cover {len(canvases)} canvases")
    runs = [run for group in groups for run in _split(group, max_buckets // len(groups))]
    return tuple(sorted(_enclose(run) for run in runs))


def _split(canvases: Sequence[Canvas], most: int) -> list[Sequence[Canvas]]:
    """Cuts canvases, largest first, into at most `most` runs of like area; the last takes all."""
    starts = [0]
    for index, (height, width) in enumerate(canvases):
        first = canvases[starts[-1]]
        if len(starts) < most and height * width * AREA_SPREAD < first[0] * first[1]:
            starts.append(index)
    return [canvases[start:end] for start, end in pairwise([*starts, len(canvases)])]


def _enclose(run: Sequence[Canvas]) -> Bucket:
    heights, widths = zip(*run, strict=True)
    return Bucket((min(heights), min(widths)), run[len(run) // 2], (max(heights), max(widths)))


def find_bucket(buckets: Sequence[Bucket], canvas: Canvas) -> int:
    """Index of the bucket that is tuned for the most similar canvas, of those that hold this one.

    Raises:
        ValueError: None does.
    """
    holding = [index for index, bucket in enumerate(buckets) if bucket.holds(canvas)]
    if not holding:
        raise ValueError(f"no bucket holds the canvas {canvas}")

    def distance(index: int) -> int:
        height, width = buckets[index].opt_hw
        return abs(height - canvas[0]) + abs(width - canvas[1])

    return min(holding, key=distance)
