"""recipe="paper": positive cells and mask targets, cell by cell (section 3.3)."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.support.paper import CANVAS, GRIDS, RANGES, objects_of, paper_config, pixels_of
from training.targets import UInt8, assign_targets

NEAR = Fraction(1, 10_000)
"""Cell widths from a cell's border within which float32 may fall to either side."""


def covered_cells(positions: list[int], size: int, grid: int) -> list[int]:
    """Cells along one axis that the centre region (c, 0.2 extent) reaches; exact.

    Skips the example (hypothesis) where an end lies so near a cell's border that float32
    cannot tell.
    """
    centre = Fraction(sum(positions), len(positions))
    extent = max(positions) - min(positions) + 1
    ends = [(centre + sign * extent / Fraction(10)) * grid / size for sign in (-1, 1)]
    for end in ends:
        assume(abs(end - round(end)) > NEAR or not 0 < round(end) < grid)
    return [cell for cell in range(grid) if ends[0] < cell + 1 and ends[1] >= cell]


def expected_cells(
    masks: list[UInt8], labels: list[int], grid: int, bounds: tuple[float, float]
) -> dict[tuple[int, int], tuple[int, int]]:
    """(i, j) -> label and index of the object that it answers for; a later object wins."""
    owners = {}
    for index, mask in enumerate(masks):
        pixels = pixels_of(mask)
        if not pixels:
            continue
        rows, columns = [y for y, _ in pixels], [x for _, x in pixels]
        area = (max(rows) - min(rows) + 1) * (max(columns) - min(columns) + 1)
        if not bounds[0] ** 2 <= area <= bounds[1] ** 2:
            continue
        for i in covered_cells(rows, CANVAS[0], grid):
            for j in covered_cells(columns, CANVAS[1], grid):
                owners[i, j] = (labels[index], index)
    return owners


@st.composite
def nasty_masks(draw: st.DrawFn) -> UInt8:
    """Rectangles, lines and pixels, also at the borders; the centre may lie outside of a mask."""
    mask = np.zeros(CANVAS, np.uint8)
    for _ in range(draw(st.integers(0, 3))):
        y, x = draw(st.integers(0, CANVAS[0] - 1)), draw(st.integers(0, CANVAS[1] - 1))
        height, width = draw(st.integers(1, CANVAS[0])), draw(st.integers(1, CANVAS[1]))
        mask[y : y + height, x : x + width] = draw(st.sampled_from([1, 1, 0]))
    return mask


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(masks=st.lists(nasty_masks(), max_size=5), data=st.data())
def test_positive_cells_by_exact_arithmetic(masks: list[UInt8], data: st.DataObject) -> None:
    labels = [data.draw(st.integers(0, 1)) for _ in masks]
    config = paper_config()
    found = assign_targets(objects_of(masks, labels), CANVAS, config.model.head, config.targets, 2)
    for target, grid, bounds in zip(found, GRIDS, RANGES, strict=True):
        expected = expected_cells(masks, labels, grid, bounds)
        assert [divmod(int(c), grid) for c in target.cells] == sorted(expected)
        for i in range(grid):
            for j in range(grid):
                assert target.labels[i, j] == expected.get((i, j), (2, 0))[0]


@pytest.mark.parametrize("seed", range(6))
def test_mask_targets_pixel_by_pixel(seed: int) -> None:
    """Bilinear, half-pixel: at stride 4 and 8 the mean of the four pixels at the middle."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(CANVAS, np.uint8)
    y, x = int(rng.integers(0, 30)), int(rng.integers(0, 40))
    mask[y : y + int(rng.integers(12, 30)), x : x + int(rng.integers(12, 30))] = 1
    mask[rng.random(CANVAS) < 0.1] = 0
    config = paper_config()
    head = replace(config.model.head, scale_ranges=((1, 2048), (1, 2048)))
    found = assign_targets(objects_of([mask], [0]), CANVAS, head, config.targets, 2)
    for target, stride in zip(found, head.mask_strides, strict=True):
        assert len(target.masks) == 1 and len(target.cells) > 0
        for y in range(CANVAS[0] // stride):
            for x in range(CANVAS[1] // stride):
                a, b = y * stride + stride // 2, x * stride + stride // 2
                around = sum(int(mask[a - u, b - v]) for u in (0, 1) for v in (0, 1))
                if around != 2:  # a half rounds either way
                    assert target.masks[0][y, x] == (around > 2)


def test_the_region_is_not_clamped_to_the_neighbours_of_the_centre() -> None:
    """An object as large as the canvas: 0.2 of 12 cells is 2.4, so more than three across."""
    config = paper_config()
    head = replace(config.model.head, num_grids=(30, 7), scale_ranges=((1, 2048), (1, 2048)))
    objects = objects_of([np.ones(CANVAS, np.uint8)], [0])
    found = assign_targets(objects, CANVAS, head, config.targets, 2)[0]
    rows = {int(c) // 30 for c in found.cells}
    assert rows == set(range(11, 18)), "0.2 * 30 = 6 cells around the middle, 14.69 +- 3"
