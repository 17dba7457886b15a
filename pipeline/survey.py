"""A slide seen as a whole before its tiles: values for the contrast rule, and where tissue is.

Symbols: H W slide, h w cells of the overview.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UnsupportedFormat
from pipeline.formats.picture import PlanePicture
from pipeline.formats.stretch import DEFAULT, count_values, limits_of_counts
from pipeline.model_config import ContrastSpec
from pipeline.preprocess import build_table, count_greys
from pipeline.types import Bool, Int64, UInt8, Window

CELL_PX = 32
"""Side of a cell of the overview."""
_BLOCK_PX = 64 * CELL_PX
_LEAST_DIFFERENCE = 1.0
"""Doublings of the grey values' deviation that tell tissue from background."""
_FAINT = 0.25
"""Of the way from the mean of the background to that of the tissue: where faint tissue begins."""


@dataclass(frozen=True)
class Survey:
    """What is known of a slide.

    Attributes:
        limits: Values of deep samples that become 0 and 255; None for 8 bits.
        table: The map [256] of intensities of the model's contrast rule; None: there is none.
        tissue: [h, w] cells that may show something.
    """

    limits: tuple[float, float] | None
    table: UInt8 | None
    tissue: Bool

    def shows_tissue(self, window: Window) -> bool:
        """Whether any cell that a window touches may show something."""
        rows = slice(window.y // CELL_PX, -(-(window.y + window.height) // CELL_PX))
        columns = slice(window.x // CELL_PX, -(-(window.x + window.width) // CELL_PX))
        return bool(self.tissue[rows, columns].any())


def survey(slide: PlanePicture, contrast: ContrastSpec | None, *, find_tissue: bool) -> Survey:
    """Reads the whole slide block by block, then the blocks with tissue again.

    Args:
        slide: The slide.
        contrast: The model's rule; it is applied to the values of the tissue.
        find_tissue: False: all of the slide counts as tissue.

    Raises:
        UnsupportedFormat: The samples are neither of 8 bits nor grey of 16 bits.
    """
    cells_hw = -(-slide.height // CELL_PX), -(-slide.width // CELL_PX)
    tissue = np.ones(cells_hw, np.bool_)
    if find_tissue:
        tissue = _find_tissue(_list_deviations(slide, cells_hw))
    if slide.is_deep:
        return Survey(limits_of_counts(_count(slide, tissue), contrast or DEFAULT), None, tissue)
    table = None if contrast is None else build_table(_count(slide, tissue), contrast)
    return Survey(None, table, tissue)


def _blocks(slide: PlanePicture) -> Iterator[Window]:
    for y in range(0, slide.height, _BLOCK_PX):
        for x in range(0, slide.width, _BLOCK_PX):
            height, width = min(_BLOCK_PX, slide.height - y), min(_BLOCK_PX, slide.width - x)
            yield Window(y, x, height, width)


def _cells_of(block: Window) -> tuple[slice, slice]:
    """Rows and columns of the cells that a block shows."""
    row, column = block.y // CELL_PX, block.x // CELL_PX
    rows, columns = -(-block.height // CELL_PX), -(-block.width // CELL_PX)
    return slice(row, row + rows), slice(column, column + columns)


def _read(slide: PlanePicture, block: Window) -> NDArray[Any]:
    """A block as RGB, or grey samples [h, w, 1] of 16 bits."""
    samples = slide.read(block)
    if not slide.is_deep:
        return slide.convert(samples, None)
    if samples.dtype != np.uint16 or samples.shape[2] != 1:
        raise UnsupportedFormat(
            f"a slide with {samples.shape[2]} samples of type {samples.dtype} is not read; 8 bits, "
            "or grey of 16 bits, are"
        )
    return samples


def _count(slide: PlanePicture, tissue: Bool) -> Int64:
    """Histogram of the grey values in the tissue."""
    counts = np.zeros(1 << 16 if slide.is_deep else 256, np.int64)
    for block in _blocks(slide):
        cells = tissue[_cells_of(block)]
        if cells.any():
            pixels = _read(slide, block)
            inside = cells.repeat(CELL_PX, axis=0).repeat(CELL_PX, axis=1)
            taken = pixels[inside[: block.height, : block.width]][:, None]
            counts += count_values(taken) if slide.is_deep else count_greys(taken)
    return counts


def _list_deviations(slide: PlanePicture, cells_hw: tuple[int, int]) -> NDArray[np.float32]:
    """Standard deviation [h, w] of the grey values in every cell."""
    deviations = np.zeros(cells_hw, np.float32)
    for block in _blocks(slide):
        pixels = _read(slide, block)
        grey = pixels[..., 0] if slide.is_deep else cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
        deviations[_cells_of(block)] = _deviations(np.asarray(grey, np.float32))
    return deviations


def _deviations(grey: NDArray[np.float32]) -> NDArray[np.float32]:
    """Standard deviation [h, w] in each cell of a block."""
    height, width = grey.shape
    padded = np.pad(grey, ((0, -height % CELL_PX), (0, -width % CELL_PX)), mode="edge")
    cells = padded.reshape(padded.shape[0] // CELL_PX, CELL_PX, -1, CELL_PX)
    found: NDArray[np.float32] = cells.std(axis=(1, 3))
    return found


def _find_tissue(deviations: NDArray[np.float32]) -> Bool:
    """Cells [h, w] that are not smooth, and those next to them.

    Otsu's threshold on the logarithm of the deviations divides them; background is smooth, whether
    it is bright or dark. If the two kinds differ by less than a factor of two, there is only one.
    """
    levels = np.log2(1 + deviations)
    low, high = float(levels.min()), float(levels.max())
    if high - low < _LEAST_DIFFERENCE:
        return np.ones(levels.shape, np.bool_)
    scaled = np.asarray((levels - low) * (255 / (high - low)), np.uint8)
    _, divided = cv2.threshold(scaled, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    above = divided > 0
    smooth = float(levels[~above].mean())
    difference = float(levels[above].mean()) - smooth if above.any() else 0.0
    if difference < _LEAST_DIFFERENCE:
        return np.ones(levels.shape, np.bool_)
    faint = levels > smooth + _FAINT * difference
    return np.asarray(cv2.dilate(faint.view(np.uint8), np.ones((3, 3), np.uint8)), np.bool_)
