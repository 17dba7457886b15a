"""Soft masks at the mask stride to RLE of the original image, without building full-size masks.

The published code upsamples a mask to the canvas, crops the padding, resizes to the original size
(both bilinearly) and thresholds. Both resizes are linear and separable: each output row and column
is a weighted mean of at most three adjacent rows and columns of the mask. RLE is column-major, so
a mask is first upsampled horizontally, inside its own box; then, in each column, only the outputs
near a threshold crossing are computed, for all columns of many masks at once. Outputs between
adjacent mask rows on the same side of the threshold are on that side too.

Symbols: H W original, h w mask at the mask stride, X output columns of a mask's box, I mask rows
that the box depends on, N crossings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import cv2
import numpy as np

from pipeline.axis import Axis, build_axis
from pipeline.runs import EncodedMask, encode_edges
from pipeline.types import Bool, Float32, Int64, Tile

CHUNK = 1 << 18
"""Values of upsampled masks, or outputs, processed at once; a single mask may exceed it."""


@dataclass(frozen=True)
class _Strip:
    """A mask upsampled horizontally, inside its box.

    Attributes:
        values: [X, I].
        x: First column of the box in the window.
        top: First of the I mask rows.
        column, row: [N] crossings of the threshold: index into the X columns, and the mask row
            after the crossing.
    """

    values: Float32
    x: int
    top: int
    column: Int64
    row: Int64


def paste_masks(
    masks: Iterable[Float32],
    tile: Tile,
    stride: int,
    image_hw: tuple[int, int],
    threshold: float = 0.5,
) -> Iterator[EncodedMask | None]:
    """Encodes soft masks as RLE of the original image.

    Args:
        masks: [h, w] each, at the mask stride of the tile's canvas.
        tile: The canvas and its window in the original.
        stride: Canvas px per mask px.
        image_hw: Height and width of the original.
        threshold: Pixels above it belong to the mask.

    Yields:
        One entry per mask, in order; None if it has no pixels.
    """
    pending: list[_Strip | None] = []
    size = 0
    for mask in masks:
        height, width = mask.shape
        down = build_axis(height, stride, tile.valid_hw[0], tile.window.height)
        across = build_axis(width, stride, tile.valid_hw[1], tile.window.width)
        strip = _enlarge(mask, down, across, threshold)
        pending.append(strip)
        size += 0 if strip is None else strip.values.size
        if size >= CHUNK:
            yield from _encode(pending, down, tile, image_hw, threshold)
            pending, size = [], 0
    if pending:
        yield from _encode(pending, down, tile, image_hw, threshold)


def _enlarge(mask: Float32, down: Axis, across: Axis, threshold: float) -> _Strip | None:
    """Upsamples a mask horizontally; None if no output depends on a pixel above the threshold."""
    x, y, width, height = cv2.boundingRect((mask > threshold).view(np.uint8))
    rows, columns = down.outputs_of(y, y + height), across.outputs_of(x, x + width)
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return None
    top, bottom = down.inputs_of(rows)
    left, right = across.inputs_of(columns)
    transposed = np.ascontiguousarray(mask[top:bottom, left:right].T)
    inputs = across.inputs[:, columns] - left
    weights = across.weights[:, columns, None]
    values = transposed.take(inputs[0], axis=0, mode="clip")
    values *= weights[0]
    term = np.empty_like(values)
    for k in (1, 2):
        transposed.take(inputs[k], axis=0, mode="clip", out=term)
        term *= weights[k]
        values += term
    first, last = max(y, top), min(y + height, bottom)  # without rows that no output depends on
    above = np.zeros((len(values), last - first + 2), np.bool_)
    np.greater(values[:, first - top : last - top], threshold, out=above[:, 1:-1])
    flat = above.reshape(-1)
    column, row = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), above.shape[1])
    return _Strip(values, columns.start, top, column, row + first)


@dataclass(frozen=True)
class _Crossings:
    """Threshold crossings of the columns of many strips, ascending by strip, column and row.

    Attributes:
        origin: [N] index, in the concatenated values of all strips, of mask row 0 of the column.
        row: [N] mask row after the crossing.
        place: [N] column-major index of the column's first pixel, with one image per strip.
        before: [N] outputs below this index depend only on rows before `row`.
        after: [N] outputs from this index on depend only on `row` and later rows.
        inside: [N] whether `row` is above the threshold.
        follows: [N] whether the crossing's output range is contiguous with that of the previous
            crossing in the same column.
    """

    origin: Int64
    row: Int64
    place: Int64
    before: Int64
    after: Int64
    inside: Bool
    follows: Bool

    def select(self, index: Int64 | Bool | slice) -> _Crossings:
        """The crossings at an index."""
        return _Crossings(*(getattr(self, field.name)[index] for field in fields(self)))


@dataclass(frozen=True)
class _Outputs:
    """Inputs of the vertical resize: the concatenated values [n] of all strips and its weights."""

    values: Float32
    down: Axis
    threshold: float

    def are_inside(self, origin: Int64, output: Int64) -> Bool:
        """Whether outputs are above the threshold; indices past the end are clipped."""
        total = np.float32(0)
        for inputs, weights in zip(self.down.inputs, self.down.weights, strict=True):
            row = inputs.take(output, mode="clip")
            row += origin
            part = self.values.take(row, mode="clip")
            part *= weights.take(output, mode="clip")
            total = total + part
        return np.asarray(total > self.threshold)


def _encode(
    strips: Sequence[_Strip | None],
    down: Axis,
    tile: Tile,
    image_hw: tuple[int, int],
    threshold: float,
) -> list[EncodedMask | None]:
    """RLE of the strips' masks; None for a None."""
    kept = [strip for strip in strips if strip is not None]
    if not kept:
        return [None] * len(strips)
    values = np.concatenate([strip.values.reshape(-1) for strip in kept])
    outputs = _Outputs(values, down, threshold)
    crossings = _gather(kept, down, tile, image_hw)
    edges = _find_edges(outputs, crossings)
    period = image_hw[0] * image_hw[1] + 1  # + 1: an edge may follow the last pixel
    starts = period * np.arange(len(kept) + 1)
    splits = np.searchsorted(edges, starts)
    edges -= np.repeat(starts[:-1], np.diff(splits))
    found = iter(encode_edges(edges, splits, image_hw))
    return [None if strip is None else next(found) for strip in strips]


def _gather(
    strips: Sequence[_Strip], down: Axis, tile: Tile, image_hw: tuple[int, int]
) -> _Crossings:
    counts = [len(strip.row) for strip in strips]
    sizes = [strip.values.size for strip in strips]
    rows = np.repeat([strip.values.shape[1] for strip in strips], counts)
    column = np.concatenate([strip.column for strip in strips])
    row = np.concatenate([strip.row for strip in strips])
    offsets = np.cumsum([0, *sizes[:-1]]) - [strip.top for strip in strips]
    image_h, image_w = image_hw
    first = [
        index * (image_h * image_w + 1) + (tile.window.x + strip.x) * image_h + tile.window.y
        for index, strip in enumerate(strips)
    ]
    place = np.repeat(first, counts) + column * image_h
    before, after = down.before[row], down.after[row]
    follows = np.zeros(len(row), np.bool_)
    np.logical_and(place[1:] == place[:-1], before[1:] <= after[:-1], out=follows[1:])
    return _Crossings(
        origin=np.repeat(offsets, counts) + column * rows,
        row=row,
        place=place,
        before=before,
        after=after,
        inside=np.arange(len(row)) % 2 == 0,  # each column begins and ends outside
        follows=follows,
    )


def _find_edges(outputs: _Outputs, crossings: _Crossings) -> Int64:
    """Edges of all strips' masks, ascending."""
    # The outputs of an isolated crossing change sides exactly once, so an estimate confirmed by
    # the outputs on both sides is exact. The others are evaluated output by output.
    isolated = ~crossings.follows
    isolated[:-1] &= ~crossings.follows[1:]
    edge = _estimate_edge(outputs, crossings)
    found = isolated & _confirm(outputs, crossings, edge)
    edges = [crossings.place[found] + edge[found]]
    rest = crossings.select(~found)
    for part in _split(rest):
        edges.append(_evaluate_edges(outputs, rest.select(part)))
    return edges[0] if len(edges) == 1 else np.sort(np.concatenate(edges))


def _estimate_edge(outputs: _Outputs, crossings: _Crossings) -> Int64:
    """First output after each crossing, by linear interpolation between the two rows."""
    place = crossings.origin + crossings.row
    low = outputs.values.take(place - 1, mode="clip")
    high = outputs.values.take(place, mode="clip")
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (outputs.threshold - low) / (high - low)
    # Where a row of another column was read, no output depends on both rows: any value will do.
    share = np.nan_to_num(np.clip(share, 0, 1))
    guess = np.ceil((crossings.row + share - 0.5) * outputs.down.scale - 0.5).astype(np.int64)
    return np.asarray(np.clip(guess, crossings.before, crossings.after))


def _confirm(outputs: _Outputs, crossings: _Crossings, edge: Int64) -> Bool:
    """Whether the outputs before and at an edge are on the sides of the rows around it."""
    earlier = outputs.are_inside(crossings.origin, edge - 1) != crossings.inside
    later = outputs.are_inside(crossings.origin, edge) == crossings.inside
    earlier |= edge == crossings.before
    later |= edge == crossings.after
    return np.asarray(earlier & later)


def _split(crossings: _Crossings) -> Iterator[slice]:
    """Splits crossings into runs of about `CHUNK` outputs, at crossings that follow no other."""
    heads = np.flatnonzero(~crossings.follows)
    if heads.size == 0:
        return
    outputs = np.cumsum(crossings.after - crossings.before)
    cuts = heads[np.flatnonzero(np.diff(outputs[heads] // CHUNK)) + 1]
    bounds = [0, *cuts.tolist(), len(outputs)]
    for start, stop in pairwise(bounds):
        yield slice(start, stop)


def _evaluate_edges(outputs: _Outputs, crossings: _Crossings) -> Int64:
    """Edges around crossings, by evaluating every output that depends on rows of both sides."""
    before, after = crossings.before.copy(), crossings.after
    before[1:] = np.where(crossings.follows[1:], np.maximum(before[1:], after[:-1]), before[1:])
    # One more output after each group represents the rows that follow it.
    closes = np.append(~crossings.follows[1:], True)
    lengths = after - before + closes
    starts = np.cumsum(lengths) - lengths
    crossing = np.repeat(np.arange(len(lengths)), lengths)
    output = np.arange(len(crossing)) + (before - starts)[crossing]
    inside = outputs.are_inside(crossings.origin[crossing], output)
    inside[(starts + lengths - 1)[closes]] = crossings.inside[closes]
    earlier = np.roll(inside, 1)
    opens = ~crossings.follows
    earlier[starts[opens]] = ~crossings.inside[opens]
    changed = np.flatnonzero(inside != earlier)
    return np.asarray(crossings.place[crossing[changed]] + output[changed])
