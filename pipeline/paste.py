"""Soft masks at the mask stride become run lengths of the original image; no full-size mask exists.

The published code enlarges a mask to the canvas bilinearly, crops the padding, resizes to the
original bilinearly and thresholds. Both steps are linear and separable: each output row and column
is a mean of at most three neighbouring rows and columns of the mask. Run lengths are kept column
by column, so a mask is first enlarged along its rows, inside its own box; then, down each column,
only the places where the threshold is crossed are computed, all columns of many masks at once.
Between two mask rows on one side of the threshold no output lies on the other side.

Symbols: H W original, h w mask at the mask stride, X output columns of a mask's box, I rows of
the mask that its box depends on, N crossings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import cv2
import numpy as np

from pipeline.axis import Axis, build_axis
from pipeline.runs import Outline, encode_edges
from pipeline.types import Bool, Float32, Int64, Tile

CHUNK = 1 << 18
"""Numbers of enlarged masks, or outputs, that are held at once, unless one mask alone has more."""


@dataclass(frozen=True)
class _Strip:
    """A mask enlarged along its rows, inside its box.

    Attributes:
        values: [X, I].
        x: The box's first column in the window.
        top: First of the I rows in the mask.
        column, row: [N] where the threshold is crossed: in which of the X columns, and before
            which row of the mask.
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
) -> Iterator[Outline | None]:
    """Soft masks as run lengths of the original image.

    Args:
        masks: [h, w] each, at the mask stride of the tile's canvas.
        tile: Where the canvas came from.
        stride: Canvas px per mask px.
        image_hw: Height and width of the original.
        threshold: A pixel belongs to a mask above this.

    Yields:
        One entry a mask, in their order; None if it has no pixel.
    """
    waiting: list[_Strip | None] = []
    size = 0
    for mask in masks:
        height, width = mask.shape
        down = build_axis(height, stride, tile.valid_hw[0], tile.window.height)
        across = build_axis(width, stride, tile.valid_hw[1], tile.window.width)
        strip = _enlarge(mask, down, across, threshold)
        waiting.append(strip)
        size += 0 if strip is None else strip.values.size
        if size >= CHUNK:
            yield from _encode(waiting, down, tile, image_hw, threshold)
            waiting, size = [], 0
    if waiting:
        yield from _encode(waiting, down, tile, image_hw, threshold)


def _enlarge(mask: Float32, down: Axis, across: Axis, threshold: float) -> _Strip | None:
    """The mask along its rows; None if no output depends on what is above the threshold."""
    x, y, width, height = cv2.boundingRect((mask > threshold).view(np.uint8))
    rows, columns = down.outputs_of(y, y + height), across.outputs_of(x, x + width)
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return None
    top, bottom = down.inputs_of(rows)
    left, right = across.inputs_of(columns)
    turned = np.ascontiguousarray(mask[top:bottom, left:right].T)
    inputs = across.inputs[:, columns] - left
    weights = across.weights[:, columns, None]
    values = turned.take(inputs[0], axis=0, mode="clip")
    values *= weights[0]
    more = np.empty_like(values)
    for k in (1, 2):
        turned.take(inputs[k], axis=0, mode="clip", out=more)
        more *= weights[k]
        values += more
    first, last = max(y, top), min(y + height, bottom)  # rows that outputs skip have no say
    above = np.zeros((len(values), last - first + 2), np.bool_)
    np.greater(values[:, first - top : last - top], threshold, out=above[:, 1:-1])
    flat = above.reshape(-1)
    column, row = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), above.shape[1])
    return _Strip(values, columns.start, top, column, row + first)


@dataclass(frozen=True)
class _Crossings:
    """Where the columns of many strips cross the threshold, ascending by strip, column and row.

    Attributes:
        origin: [N] where row 0 of the mask would be in all strips' values, of the column.
        row: [N] the row before lies on the other side of the threshold.
        place: [N] first pixel of the column, counted column by column through one image a strip.
        before: [N] outputs before this one depend on the rows before alone.
        after: [N] outputs from this one on depend on `row` and the rows after alone.
        inside: [N] whether `row` is above the threshold.
        follows: [N] whether there is no output between this crossing's and those of the one
            before it in the column.
    """

    origin: Int64
    row: Int64
    place: Int64
    before: Int64
    after: Int64
    inside: Bool
    follows: Bool

    def pick(self, which: Int64 | Bool | slice) -> _Crossings:
        """Some of them."""
        return _Crossings(*(getattr(self, field.name)[which] for field in fields(self)))


@dataclass(frozen=True)
class _Outputs:
    """What outputs are computed from: all strips' values [n] and the weights down the columns."""

    values: Float32
    down: Axis
    threshold: float

    def are_inside(self, origin: Int64, output: Int64) -> Bool:
        """Whether outputs of columns are above the threshold; beyond the last one it stands."""
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
) -> list[Outline | None]:
    """Run lengths of strips' masks."""
    kept = [strip for strip in strips if strip is not None]
    if not kept:
        return [None] * len(strips)
    values = np.concatenate([strip.values.reshape(-1) for strip in kept])
    outputs = _Outputs(values, down, threshold)
    crossings = _gather(kept, down, tile, image_hw)
    edges = _find_edges(outputs, crossings)
    period = image_hw[0] * image_hw[1] + 1  # one more: an edge may lie behind the last pixel
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
    # Of a crossing alone the outputs change sides once: a guess that both neighbours confirm is
    # right. The rest is computed output by output.
    alone = ~crossings.follows
    alone[:-1] &= ~crossings.follows[1:]
    edge = _guess_edge(outputs, crossings)
    found = alone & _confirm(outputs, crossings, edge)
    edges = [crossings.place[found] + edge[found]]
    rest = crossings.pick(~found)
    for part in _split(rest):
        edges.append(_walk(outputs, rest.pick(part)))
    return edges[0] if len(edges) == 1 else np.sort(np.concatenate(edges))


def _guess_edge(outputs: _Outputs, crossings: _Crossings) -> Int64:
    """First output behind each crossing, if outputs lay on straight lines between the rows."""
    place = crossings.origin + crossings.row
    low = outputs.values.take(place - 1, mode="clip")
    high = outputs.values.take(place, mode="clip")
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (outputs.threshold - low) / (high - low)
    # Where a row of another column was taken there is no output to find: any guess will do.
    share = np.nan_to_num(np.clip(share, 0, 1))
    guess = np.ceil((crossings.row + share - 0.5) * outputs.down.scale - 0.5).astype(np.int64)
    return np.asarray(np.clip(guess, crossings.before, crossings.after))


def _confirm(outputs: _Outputs, crossings: _Crossings, edge: Int64) -> Bool:
    """Whether outputs before and at an edge lie on the sides where the rows around it lie."""
    earlier = outputs.are_inside(crossings.origin, edge - 1) != crossings.inside
    later = outputs.are_inside(crossings.origin, edge) == crossings.inside
    earlier |= edge == crossings.before
    later |= edge == crossings.after
    return np.asarray(earlier & later)


def _split(crossings: _Crossings) -> Iterator[slice]:
    """Runs of crossings with about `CHUNK` outputs, cut where a crossing follows none."""
    heads = np.flatnonzero(~crossings.follows)
    if heads.size == 0:
        return
    outputs = np.cumsum(crossings.after - crossings.before)
    cuts = heads[np.flatnonzero(np.diff(outputs[heads] // CHUNK)) + 1]
    bounds = [0, *cuts.tolist(), len(outputs)]
    for start, stop in pairwise(bounds):
        yield slice(start, stop)


def _walk(outputs: _Outputs, crossings: _Crossings) -> Int64:
    """Edges around crossings, from every output that depends on rows of both sides."""
    before, after = crossings.before.copy(), crossings.after
    before[1:] = np.where(crossings.follows[1:], np.maximum(before[1:], after[:-1]), before[1:])
    # The output behind the last one of a group stands for the rows that follow.
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
