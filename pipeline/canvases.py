"""The canvas shapes a model can receive, and the optimisation profiles that cover them.

Symbols: H W canvas.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise

from pipeline.model_config import Canvas, InputSpec, KeepRatioResize, ModelConfig, TileResize
from pipeline.preprocess import keep_ratio_size

RATIOS = (1.0, 4 / 3, 3 / 2)
"""Long to short side of the images for which `choose_canvases` takes the exact canvas."""
RATIO_PX = 6000
"""Short side of an image of such a ratio, large enough to be exact."""

AREA_SPREAD = 1.5
"""Greatest ratio of areas within one bucket."""


@dataclass(frozen=True, order=True)
class Bucket:
    """The range of canvas shapes of one optimisation profile.

    Attributes:
        min_hw, max_hw: Minimum and maximum of height and width, per side.
        opt_hw: The shape the engine is tuned for; one of the actual canvases.
    """

    min_hw: Canvas
    opt_hw: Canvas
    max_hw: Canvas

    def holds(self, canvas: Canvas) -> bool:
        """Whether both sides are within the range."""
        sides = zip(self.min_hw, canvas, self.max_hw, strict=True)
        return all(low <= side <= high for low, side, high in sides)


def list_canvases(spec: InputSpec) -> tuple[Canvas, ...]:
    """Every canvas shape that images of any size can produce, ascending.

    Tiles have a single shape. Under the published resize rule either the short side equals
    `short_side` and the long side is at most `long_side`, or the long side equals `long_side` and
    the short side is at most `short_side`; both sides are then padded, in either orientation.
    """
    if isinstance(spec.resize, TileResize):
        return (spec.resize.canvas_hw,)
    return _turn({spec.resize.pad(short, long) for short, long in _list_sides(spec.resize)})


def choose_canvases(spec: InputSpec) -> tuple[Canvas, ...]:
    """The canvases that GPUs are prepared for: at most 7, which hold those of images of any size.

    An image of any of the `RATIOS` keeps its exact canvas; others take the next larger one. Tiles
    have a single shape.
    """
    if isinstance(spec.resize, TileResize):
        return (spec.resize.canvas_hw,)
    resize = spec.resize
    images = [(RATIO_PX, round(RATIO_PX * ratio)) for ratio in RATIOS]
    sizes = [keep_ratio_size(hw, resize.short_side, resize.long_side) for hw in images]
    return _turn({resize.pad(height, width) for height, width in sizes} | {resize.largest_sides})


def find_padding(config: ModelConfig, device: str) -> tuple[Canvas, ...]:
    """What canvases are padded to on a device, see `prepare`; empty on the CPU: they are exact."""
    return () if device == "cpu" else config.canvases


def find_recorded(config: ModelConfig) -> tuple[Canvas, ...]:
    """The canvases that an engine on a GPU is warmed up for; empty if they are not known."""
    if config.canvases:
        return config.canvases
    every = list_canvases(config.input)
    return every if len(every) == 1 else ()


def _list_sides(resize: KeepRatioResize) -> list[tuple[int, int]]:
    """Possible short and long sides after the resize, before padding."""
    short_side, long_side = resize.short_side, resize.long_side
    reached = [(short_side, long) for long in range(short_side, long_side + 1)]
    bounded = [(short, long_side) for short in range(1, min(short_side, long_side) + 1)]
    return reached + bounded


def _turn(landscape: Set[Canvas]) -> tuple[Canvas, ...]:
    """The canvases and their transposes, ascending."""
    return tuple(sorted(landscape | {(width, height) for height, width in landscape}))


def cover_canvases(canvases: Collection[Canvas], max_buckets: int = 8) -> tuple[Bucket, ...]:
    """At most `max_buckets` buckets that together contain every canvas.

    Landscape and portrait canvases get separate buckets: a range that contains both would also
    contain the square of their long side, and an engine allocates memory for its largest shape.
    Within an orientation, canvases of similar area share a bucket; the last bucket takes all
    smaller ones, which only very elongated images produce.

    Args:
        canvases: At least one.
        max_buckets: Each bucket costs build time and memory. At least 2 if both orientations
            occur.

    Raises:
        ValueError: `canvases` is empty, or `max_buckets` is too low.
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


def _split(canvases: Sequence[Canvas], limit: int) -> list[Sequence[Canvas]]:
    """Splits canvases, largest first, into at most `limit` runs of similar area."""
    starts = [0]
    for index, (height, width) in enumerate(canvases):
        first = canvases[starts[-1]]
        if len(starts) < limit and height * width * AREA_SPREAD < first[0] * first[1]:
            starts.append(index)
    return [canvases[start:end] for start, end in pairwise([*starts, len(canvases)])]


def _enclose(run: Sequence[Canvas]) -> Bucket:
    heights, widths = zip(*run, strict=True)
    return Bucket((min(heights), min(widths)), run[len(run) // 2], (max(heights), max(widths)))


def find_bucket(buckets: Sequence[Bucket], canvas: Canvas) -> int:
    """Index of the bucket that contains the canvas and whose `opt_hw` is closest to it.

    Raises:
        ValueError: No bucket contains it.
    """
    holding = [index for index, bucket in enumerate(buckets) if bucket.holds(canvas)]
    if not holding:
        raise ValueError(f"no bucket contains the canvas {canvas}")

    def distance(index: int) -> int:
        height, width = buckets[index].opt_hw
        return abs(height - canvas[0]) + abs(width - canvas[1])

    return min(holding, key=distance)
