"""An image becomes canvases: contrast, resize, pad (`reference`: the published test pipeline).

The canvas follows from the image and the model's canvases alone, never from the batch: SOLO's grid
and coordinates are relative to it, so another canvas would give another answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import overload

import cv2
import numpy as np

from pipeline.model_config import Canvas, ContrastSpec, InputSpec, KeepRatioResize, TileResize
from pipeline.types import Int64, Prepared, Tile, UInt8, Window

HW = tuple[int, int]
ReadRegion = Callable[[Window], UInt8]
"""Gives the pixels [h, w, 3] of a region of an image."""
_STRIPE_PIXELS = 1 << 20
"""Pixels that are converted to grey at once."""


def contrast_table(image: UInt8, spec: ContrastSpec) -> UInt8:
    """The map of intensities that sends two percentiles of the grey values to 0 and 255.

    Args:
        image: [H, W, 3] uint8 RGB.
        spec: Percentiles and the least range.

    Returns:
        [256] uint8, for all channels; values beyond the percentiles saturate.
    """
    return build_table(count_greys(image), spec)


def count_greys(image: UInt8) -> Int64:
    """Histogram [256] of the grey values of an image [H, W, 3] RGB."""
    counts = np.zeros(256, np.int64)
    height, width = image.shape[:2]
    rows = max(1, _STRIPE_PIXELS // width)
    columns = min(width, _STRIPE_PIXELS)
    for y in range(0, height, rows):
        for x in range(0, width, columns):
            grey = cv2.cvtColor(image[y : y + rows, x : x + columns], cv2.COLOR_RGB2GRAY)
            found = cv2.calcHist([grey], [0], None, [256], [0, 256])  # exact below 2**24
            counts += found.ravel().astype(np.int64)
    return counts


def build_table(counts: Int64, spec: ContrastSpec) -> UInt8:
    """`contrast_table` of an image with this histogram [256]."""
    low, high = (_percentile(counts, q) for q in (spec.low, spec.high))
    gain = 255.0 / max(high - low, spec.min_range)
    table = (np.arange(256, dtype=np.float64) - low) * gain
    return np.clip(np.floor(table + 0.5), 0, 255).astype(np.uint8)


def _percentile(counts: np.ndarray[tuple[int], np.dtype[np.int64]], q: float) -> float:
    """`numpy.percentile` (linear) of the values that a histogram [256] counts, to the bit."""
    last = int(counts.sum()) - 1
    place = last * (q / 100)
    below = math.floor(place)
    ends = np.searchsorted(np.cumsum(counts), [below, min(below + 1, last)], side="right")
    low, high = (float(value) for value in ends)
    share = place - below
    return high - (high - low) * (1 - share) if share >= 0.5 else low + (high - low) * share


def stretch_contrast(image: UInt8, spec: ContrastSpec) -> UInt8:
    """Applies `contrast_table` to a whole image.

    Args:
        image: [H, W, 3] uint8 RGB.
        spec: Percentiles and the least range.

    Returns:
        [H, W, 3] uint8.
    """
    return np.asarray(cv2.LUT(image, contrast_table(image, spec)), np.uint8)


def keep_ratio_size(image_hw: tuple[int, int], short_side: int, long_side: int) -> tuple[int, int]:
    """Height and width after the published resize, int(x * scale + 0.5), at least 1 px."""
    height, width = image_hw
    scale = min(long_side / max(height, width), short_side / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def _canvas(part: UInt8, size: tuple[int, int], canvas_hw: tuple[int, int]) -> UInt8:
    """Resizes [h, w, 3] bilinearly to `size` and pads with zeros to [Hc, Wc, 3]."""
    canvas = np.empty((*canvas_hw, 3), np.uint8)
    canvas[size[0] :] = canvas[:, size[1] :] = 0
    shown = canvas[: size[0], : size[1]]
    assert shown.shape[:2] == size
    if part.shape[:2] == size:
        shown[:] = part
    else:  # into its place: no copy
        cv2.resize(part, size[::-1], dst=shown, interpolation=cv2.INTER_LINEAR)
    return canvas


def round_canvas(canvas_hw: Canvas, canvases: Sequence[Canvas]) -> Canvas:
    """The smallest of some canvases that holds another one.

    Raises:
        ValueError: None does.
    """
    holding = [c for c in canvases if c[0] >= canvas_hw[0] and c[1] >= canvas_hw[1]]
    if not holding:
        raise ValueError(f"none of the canvases {list(canvases)} holds {canvas_hw}")
    return min(holding, key=lambda c: (c[0] * c[1], c))


def _count_tiles(length: int, tile: int, overlap: int) -> int:
    return 1 if length <= tile else -(-(length - overlap) // (tile - overlap))


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Starts of evenly spread tiles that cover `length` px with at least `overlap` px shared."""
    count = _count_tiles(length, tile, overlap)
    if count == 1:
        return [0]
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def count_canvases(image_hw: tuple[int, int], spec: InputSpec) -> int:
    """Canvases that `prepare` makes of an image of this size; nothing is allocated.

    Args:
        image_hw: Height and width, px, at least 1.
        spec: The model's input.
    """
    if not isinstance(spec.resize, TileResize):
        return 1
    resize = spec.resize
    return math.prod(
        _count_tiles(length, tile, resize.overlap_px)
        for length, tile in zip(image_hw, resize.tile_hw, strict=True)
    )


def _shared(starts: Sequence[int], index: int, tile: int) -> tuple[int | None, int | None]:
    """Px that a tile shares with the one before it and the one after it; None: there is none."""
    before = starts[index - 1] + tile - starts[index] if index else None
    after = starts[index] + tile - starts[index + 1] if index + 1 < len(starts) else None
    return before, after


class _Canvases(Sequence[Tile]):
    """The canvases of an image in row order; each is made on access and not kept."""

    def __init__(
        self,
        read: ReadRegion,
        image_hw: tuple[int, int],
        spec: InputSpec,
        canvases: Sequence[Canvas],
        table: UInt8 | None,
    ) -> None:
        self._read = read
        self._canvases = canvases
        self._image_hw = image_hw
        self._resize = spec.resize
        self._table = table
        self._starts = ([0], [0])
        if isinstance(spec.resize, TileResize):
            tile_hw, overlap = spec.resize.tile_hw, spec.resize.overlap_px
            self._starts = (
                tile_starts(image_hw[0], tile_hw[0], overlap),
                tile_starts(image_hw[1], tile_hw[1], overlap),
            )
            h, w = (min(pair) for pair in zip(tile_hw, image_hw, strict=True))
            scale = spec.resize.scale
            self._part_hw = h, w
            self._size = max(1, round(h * scale)), max(1, round(w * scale))
            self._canvas_hw = spec.resize.canvas_hw
        self._length = len(self._starts[0]) * len(self._starts[1])

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Tile: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tile]: ...

    def __getitem__(self, index: int | slice) -> Tile | list[Tile]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -self._length <= index < self._length:
            raise IndexError(f"canvas {index} of {self._length}")
        row, column = divmod(index % self._length, len(self._starts[1]))
        if isinstance(self._resize, TileResize):
            return self._cut(row, column)
        return self._shrink(self._resize)

    def _cut(self, row: int, column: int) -> Tile:
        (ys, xs), (h, w) = self._starts, self._part_hw
        y, x = ys[row], xs[column]
        part = self._stretch(self._read(Window(y, x, h, w)))
        canvas = _canvas(part, self._size, self._canvas_hw)
        (top, bottom), (left, right) = _shared(ys, row, h), _shared(xs, column, w)
        return Tile(canvas, self._size, Window(y, x, h, w), (top, left, bottom, right))

    def _shrink(self, resize: KeepRatioResize) -> Tile:
        size = keep_ratio_size(self._image_hw, resize.short_side, resize.long_side)
        canvas_hw = resize.pad(*size)
        if self._canvases:
            canvas_hw = round_canvas(canvas_hw, self._canvases)
        window = Window(0, 0, *self._image_hw)
        return Tile(_canvas(self._stretch(self._read(window)), size, canvas_hw), size, window)

    def _stretch(self, part: UInt8) -> UInt8:
        return part if self._table is None else np.asarray(cv2.LUT(part, self._table), np.uint8)


def needed_hw(image_hw: tuple[int, int], spec: InputSpec) -> tuple[int, int]:
    """The size to which the model resizes an image; decoding more pixels gains nothing.

    Returns:
        Height and width; 0, 0 where the model needs the image as it is.
    """
    if isinstance(spec.resize, TileResize):
        return 0, 0
    return keep_ratio_size(image_hw, spec.resize.short_side, spec.resize.long_side)


def prepare(
    image: UInt8,
    spec: InputSpec,
    *,
    image_hw: tuple[int, int] | None = None,
    canvases: Sequence[Canvas] = (),
) -> Prepared:
    """Contrast and resize rule of a model applied to one image.

    Args:
        image: [H, W, 3] uint8 RGB, H and W at least 1.
        spec: The model's input.
        image_hw: Height and width of the original, if `image` was decoded at a smaller scale
            (see `needed_hw`). Instances are in its coordinates.
        canvases: The canvas is padded to the smallest of these that holds it; empty: to the
            rule's multiple. Tiles keep their canvas.

    Returns:
        Its canvases, all of one shape; they are made on access and refer to `image`.

    Raises:
        ValueError: The array is not [H, W, 3] uint8 or has no pixels, or it is not the original
            and the model needs that. Or none of the canvases holds the image.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(f"image is {image.dtype} {image.shape}, expected uint8 [H, W, 3]")
    shape_hw = (image.shape[0], image.shape[1])
    image_hw = image_hw or shape_hw
    if isinstance(spec.resize, TileResize) and image_hw != shape_hw:
        raise ValueError(f"tiles are cut from the image of {image_hw}, not from {shape_hw}")
    table = None if spec.contrast is None else contrast_table(image, spec.contrast)

    def read(window: Window) -> UInt8:
        if isinstance(spec.resize, TileResize):
            return image[window.y : window.y + window.height, window.x : window.x + window.width]
        return image

    return Prepared(image_hw, _Canvases(read, image_hw, spec, canvases, table))


def prepare_regions(
    read: ReadRegion, image_hw: tuple[int, int], spec: InputSpec, table: UInt8 | None
) -> Prepared:
    """The canvases of an image that is read by regions; the same as those of the whole image.

    Args:
        read: Gives a region of the image.
        image_hw: Height and width of the image.
        spec: The input of a model with tiles.
        table: `contrast_table` of the whole image; None: contrast is left as it is.

    Raises:
        ValueError: The model has no tiles.
    """
    if not isinstance(spec.resize, TileResize):
        raise ValueError("the model resizes every image as a whole")
    return Prepared(image_hw, _Canvases(read, image_hw, spec, (), table))


def windows_of(image_hw: tuple[int, int], spec: InputSpec) -> tuple[list[int], list[int], HW]:
    """First rows and first columns of the tiles of an image, and a tile's height and width, px.

    Raises:
        ValueError: The model has no tiles.
    """
    if not isinstance(spec.resize, TileResize):
        raise ValueError("the model resizes every image as a whole")
    (height, width), overlap = spec.resize.tile_hw, spec.resize.overlap_px
    rows = tile_starts(image_hw[0], height, overlap)
    columns = tile_starts(image_hw[1], width, overlap)
    return rows, columns, (min(height, image_hw[0]), min(width, image_hw[1]))
