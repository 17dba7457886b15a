"""Overlapping masks become disjoint ones, on the runs of their RLE.

All masks' runs, split at the ends of columns, cut the image's column-major pixels into cells, so
that a mask is a set of whole cells: memory and time follow the runs, not the pixels.

Symbols: R runs of a mask, E cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipeline.runs import encode_edges, read_counts
from pipeline.types import Bool, Detection, Int64

MIN_LEFT = 0.5
"""An instance that keeps a smaller share of its pixels is dropped."""
MIN_PIECE = 0.1
"""Of an instance that lost pixels, connected pieces below this share of its pixels go."""


def resolve_overlaps(instances: Sequence[Detection]) -> list[Detection]:
    """Gives each pixel to the best instance that claims it.

    An instance that loses no pixel stays as it is. Of any other the pieces (8-connected) below
    `MIN_PIECE` of its pixels go, and all of it if less than `MIN_LEFT` is left; what goes is free
    for worse instances. A better instance never loses pixels to a worse one.

    Args:
        instances: Of one image, best first.

    Returns:
        The instances that are left, in their order, with their scores.
    """
    if len(instances) < 2:
        return list(instances)
    height = instances[0].rle["size"][0]
    runs = [column_runs(i) for i in instances]
    bounds = np.unique(np.concatenate([r.ravel() for r in runs]))
    sizes = np.diff(bounds)
    taken = np.zeros(len(sizes), np.bool_)
    kept = []
    for instance, own in zip(instances, runs, strict=True):
        cells = _expand(np.searchsorted(bounds, own))
        free = cells[~taken[cells]]
        left = instance
        if free.size < cells.size:
            free = _drop_pieces(free, bounds, height, MIN_PIECE * instance.area)
            if sizes[free].sum() < MIN_LEFT * instance.area:
                continue
            left = _rebuild(instance, free, bounds)
        taken[free] = True
        kept.append(left)
    return kept


def column_runs(instance: Detection) -> Int64:
    """Runs [R, 2] of a mask, start and exclusive end; none spans two columns."""
    height, width = instance.rle["size"]
    edges = np.cumsum(read_counts(instance.rle["counts"], height * width))
    starts, ends = edges[: len(edges) // 2 * 2].reshape(-1, 2).T
    columns = (ends - 1) // height - starts // height + 1
    column = _expand(np.stack([starts // height, starts // height + columns], axis=1))
    first = np.maximum(np.repeat(starts, columns), column * height)
    last = np.minimum(np.repeat(ends, columns), (column + 1) * height)
    return np.stack([first, last], axis=1)


def _expand(ranges: Int64) -> Int64:
    """All integers of ranges [R, 2], whose ends are exclusive."""
    lengths = ranges[:, 1] - ranges[:, 0]
    ends = np.cumsum(lengths)
    numbers: Int64 = np.arange(lengths.sum()) + np.repeat(ranges[:, 0] - ends + lengths, lengths)
    return numbers


def _join(cells: Int64, bounds: Int64, height: int) -> tuple[Int64, Int64]:
    """Joins contiguous cells of a column: runs [R, 2], and the run [E] of each cell."""
    starts, ends = bounds[cells], bounds[cells + 1]
    first = np.ones(len(cells), np.bool_)
    first[1:] = (starts[1:] != ends[:-1]) | (starts[1:] % height == 0)
    last = np.append(first[1:], True)[: len(cells)]
    return np.stack([starts[first], ends[last]], axis=1), np.cumsum(first) - 1


def _drop_pieces(cells: Int64, bounds: Int64, height: int, least: float) -> Int64:
    """The cells of the connected pieces that have at least some number of pixels."""
    runs, run_of = _join(cells, bounds, height)
    piece = _label_pieces(runs, height)
    pixels = np.bincount(piece, runs[:, 1] - runs[:, 0])
    large: Bool = pixels[piece] >= least
    return cells[large[run_of]]


def _label_pieces(runs: Int64, height: int) -> Int64:
    """A number for each run [R, 2] that is common to all runs connected with it."""
    starts, ends = runs.T
    next_column = (starts // height + 1) * height
    low = np.searchsorted(ends, np.maximum(starts + height, next_column + 1), side="left")
    high = np.searchsorted(starts, np.minimum(ends + height, next_column + height - 1), "right")
    parent = list(range(len(runs)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = run = parent[parent[run]]
        return run

    for run, (a, b) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        for other in range(a, b):
            parent[root(other)] = root(run)
    return np.array([root(run) for run in range(len(runs))], np.int64)


def _rebuild(instance: Detection, cells: Int64, bounds: Int64) -> Detection:
    edges = np.stack([bounds[cells], bounds[cells + 1]], axis=1).ravel()
    height, width = instance.rle["size"]
    (mask,) = encode_edges(edges, np.array([0, len(edges)]), (height, width))
    assert mask is not None
    return replace(instance, rle=mask.rle, bbox_xywh=mask.bbox_xywh, area=mask.area)
