from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.model_config import InputSpec, KeepRatioResize, TileResize
from training.configs.grids import (
    CanvasObjects,
    count_without_cell,
    nearest_neighbours,
    place_objects,
    share_without_cell,
)
from training.configs.schema import HeadConfig, TargetConfig
from training.configs.statistics import ImageObjects
from training.targets import Objects, assign_targets

HEAD = HeadConfig(
    num_grids=(8, 4),
    level_strides=(8, 8),
    mask_strides=(4, 4),
    scale_ranges=((1, 24), (16, 2048)),
)


def image(*boxes: tuple[float, float, float, float], height: int, width: int) -> ImageObjects:
    return ImageObjects(
        image_hw=(height, width), boxes_xywh=np.asarray(boxes, np.float64).reshape(-1, 4)
    )


def canvas(*boxes: tuple[float, float, float, float], side: int = 64) -> CanvasObjects:
    found = image(*boxes, height=side, width=side)
    return CanvasObjects(np.asarray([side, side]), found.centres_xy, found.boxes_xywh[:, 2:])


def test_keep_ratio_scales_and_pads() -> None:
    spec = InputSpec(resize=KeepRatioResize(short_side=50, long_side=200))
    (placed,) = place_objects(image((20, 10, 40, 20), height=100, width=200), spec)
    assert placed.canvas_wh.tolist() == [128, 64]
    assert placed.centres_xy.tolist() == [[20, 10]]
    assert placed.sides_wh.tolist() == [[20, 10]] and placed.sizes == pytest.approx(200**0.5)


def test_tiles_get_the_objects_whose_centres_they_contain() -> None:
    spec = InputSpec(resize=TileResize(scale=2.0, tile_hw=(32, 48), overlap_px=8))
    found = image((0, 0, 10, 10), (50, 40, 10, 12), (40, 0, 30, 80), height=100, width=100)
    placed = place_objects(found, spec)
    assert all(p.canvas_wh.tolist() == [96, 64] for p in placed)
    boxes = [(c.tolist(), s.tolist()) for p in placed for c, s in [(p.centres_xy, p.sides_wh)]]
    assert boxes == [([[10, 10]], [[20, 20]]), ([[14, 28], [14, 16]], [[20, 24], [60, 64]])]
    assert place_objects(image(height=5, width=5), spec) == []


def test_neighbours_are_apart_along_the_longer_axis() -> None:
    placed = canvas((0, 0, 2, 2), (16, 0, 2, 2), (16, 8, 2, 2), (40, 40, 2, 2))
    everything = np.ones(4, np.bool_)
    assert nearest_neighbours(placed, everything).tolist() == [0.25, 0.125, 0.125, 0.5]
    assert nearest_neighbours(placed, np.asarray([True, False, False, False])).size == 0


def test_objects_in_one_cell_lose_all_but_one() -> None:
    same = (30, 30, 4, 4)
    assert count_without_cell(canvas(same, same, same), HEAD, 0.2) == 2
    assert count_without_cell(canvas(same, (1, 1, 4, 4)), HEAD, 0.2) == 0
    assert count_without_cell(canvas(same, (20, 20, 40, 40)), HEAD, 0.2) == 0  # another level
    outside = replace(HEAD, scale_ranges=((1, 2), (16, 2048)))
    assert count_without_cell(canvas(same), outside, 0.2) == 1  # no level has its size
    assert share_without_cell([canvas(same, same), canvas(), canvas(same)], HEAD, 0.2) == 1 / 3
    assert share_without_cell([], HEAD, 0.2) == 0


BOX = st.tuples(*(st.integers(0, 31) for _ in range(2)), *(st.integers(1, 32) for _ in range(2)))


@given(boxes=st.lists(BOX, max_size=16), grid=st.sampled_from([1, 2, 4, 8, 16]))
def test_it_agrees_with_the_targets_of_rectangles(
    boxes: list[tuple[int, int, int, int]], grid: int
) -> None:
    boxes.sort(key=lambda b: -b[2] * b[3])
    head = HeadConfig(
        num_grids=(grid,), level_strides=(8,), mask_strides=(4,), scale_ranges=((1, 2048),)
    )
    masks = np.zeros((len(boxes), 64, 64), np.uint8)
    for mask, (x, y, w, h) in zip(masks, boxes, strict=True):
        mask[y : y + h, x : x + w] = 1
    xywh = np.asarray(boxes, np.float32).reshape(-1, 4)
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    objects = Objects(masks, corners, np.zeros(len(boxes), np.int64))
    scale = 0.25  # exact in float32, so that no border of a cell is a matter of rounding
    (level,) = assign_targets(objects, (64, 64), head, TargetConfig(centre_scale=scale), 1)
    # The centre of mass of pixels is half a pixel before the middle of their box.
    centres = xywh[:, :2].astype(np.float64) + xywh[:, 2:] / 2 - 0.5
    placed = CanvasObjects(np.asarray([64.0, 64.0]), centres, xywh[:, 2:].astype(np.float64))
    assert count_without_cell(placed, head, scale) == len(boxes) - len(level.masks)
