from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from pipeline.contour import draw_contour
from tests.support.drawn_targets import (
    CANVAS,
    HEAD,
    PAPER,
    PUBLISHED,
    brute_force,
    objects_of,
    random_objects,
)
from tests.support.tiny import disc
from training.configs.schema import HeadConfig, TargetConfig
from training.cropped_masks import CroppedMasks
from training.targets import (
    LevelTargets,
    Objects,
    assign_targets,
    centre_of_mass,
    contour_mask,
    grid_cell,
    resize_mask,
)


@pytest.mark.parametrize("config", [PUBLISHED, PAPER], ids=["published", "paper"])
@pytest.mark.parametrize("seed", range(12))
def test_cells_labels_and_masks_against_brute_force(seed: int, config: TargetConfig) -> None:
    objects = random_objects(seed, 9)
    found = assign_targets(objects, CANVAS, HEAD, config, 3)
    assert sum(len(target.cells) for target in found) > 0
    for level, (labels, owner) in enumerate(brute_force(objects, HEAD, config)):
        target = found[level]
        np.testing.assert_array_equal(target.labels, labels)
        assert target.cells.tolist() == sorted(owner)
        for cell, row in zip(target.cells, target.mask_index, strict=True):
            mask = objects.masks[owner[cell]]
            np.testing.assert_array_equal(
                target.masks[row], resize_mask(mask, HEAD.mask_strides[level])
            )


def test_an_object_takes_about_three_cells_on_a_level() -> None:
    counts = []
    for seed in range(30):
        objects = random_objects(seed, 1)
        counts += [len(t.cells) for t in assign_targets(objects, CANVAS, HEAD, PAPER, 3)]
    taken = [count for count in counts if count]
    assert 1.5 < np.mean(taken) < 5


def test_the_recipes_differ_where_the_box_is_not_the_masks() -> None:
    head = replace(HEAD, num_grids=(40, 8, 5), scale_ranges=((1, 2048),) * 3)
    mask = disc(*CANVAS, 48, 64, 40)
    objects = objects_of([mask])
    objects.boxes_xyxy[:] = 60, 44, 68, 52
    published = assign_targets(objects, CANVAS, head, PUBLISHED, 3)[0]
    paper = assign_targets(objects, CANVAS, head, PAPER, 3)[0]
    assert len(published.cells) <= 9
    assert len(paper.cells) > len(published.cells)


def test_published_extents_stop_a_cell_beside_the_centre() -> None:
    head = replace(HEAD, num_grids=(40, 8, 5), scale_ranges=((1, 2048),) * 3)
    mask = np.ones(CANVAS, np.uint8)
    target = assign_targets(objects_of([mask]), CANVAS, head, PUBLISHED, 3)[0]
    assert len(target.cells) == 9
    target = assign_targets(objects_of([mask]), CANVAS, head, PAPER, 3)[0]
    assert len(target.cells) > 40


def test_bounds_of_a_scale_range_are_inclusive() -> None:
    mask = np.zeros(CANVAS, np.uint8)
    mask[20:52, 20:52] = 1  # 32 x 32: the top of level 0, inside level 1
    found = assign_targets(objects_of([mask]), CANVAS, HEAD, PUBLISHED, 3)
    assert [len(t.cells) > 0 for t in found] == [True, True, False]


def test_no_objects() -> None:
    found = assign_targets(objects_of([]), CANVAS, HEAD, PUBLISHED, 3)
    for target, grid, stride in zip(found, HEAD.num_grids, HEAD.mask_strides, strict=True):
        assert (target.labels == 3).all() and target.labels.shape == (grid, grid)
        assert target.cells.dtype == np.int64 and target.cells.size == 0
        assert target.mask_index.size == 0
        assert target.masks.shape == (0, CANVAS[0] // stride, CANVAS[1] // stride)


@pytest.mark.parametrize("config", [PUBLISHED, PAPER], ids=["published", "paper"])
def test_an_empty_mask_is_skipped(config: TargetConfig) -> None:
    objects = objects_of([np.zeros(CANVAS, np.uint8), disc(*CANVAS, 40, 40, 10)])
    objects.boxes_xyxy[0] = 10, 10, 30, 30
    found = assign_targets(objects, CANVAS, HEAD, config, 3)
    alone = assign_targets(objects_of([objects.masks[1]], [1]), CANVAS, HEAD, config, 3)
    for a, b in zip(found, alone, strict=True):
        np.testing.assert_array_equal(a.cells, b.cells)
        np.testing.assert_array_equal(a.labels, b.labels)


@pytest.mark.parametrize("position", [(0, 0), (95, 127), (50, 63), (0, 127)])
def test_one_pixel_takes_one_cell(position: tuple[int, int]) -> None:
    mask = np.zeros(CANVAS, np.uint8)
    mask[position] = 1
    found = assign_targets(objects_of([mask], [2]), CANVAS, HEAD, PUBLISHED, 3)
    cell = int(position[0] / 96 * 12) * 12 + int(position[1] / 128 * 12)
    assert found[0].cells.tolist() == [cell]
    assert found[0].labels.reshape(-1)[cell] == 2
    assert [len(t.cells) for t in found[1:]] == [0, 0]


def test_a_later_object_overwrites_an_earlier_one() -> None:
    big, small = disc(*CANVAS, 48, 64, 14), disc(*CANVAS, 48, 64, 9)
    first = assign_targets(objects_of([big, small], [0, 1]), CANVAS, HEAD, PUBLISHED, 3)[0]
    second = assign_targets(objects_of([small, big], [1, 0]), CANVAS, HEAD, PUBLISHED, 3)[0]
    cell = 6 * 12 + 6
    assert first.labels.reshape(-1)[cell] == 1
    assert second.labels.reshape(-1)[cell] == 0
    row = first.mask_index[first.cells.tolist().index(cell)]
    np.testing.assert_array_equal(first.masks[row], resize_mask(small, 4))
    assert len(second.masks) == 1  # the object that lost all its cells leaves no mask


def test_four_hundred_objects() -> None:
    masks = [disc(*CANVAS, 2 + 4.8 * i, 3 + 6.4 * j, 2) for i in range(20) for j in range(20)]
    found = assign_targets(objects_of(masks), CANVAS, HEAD, PUBLISHED, 3)
    assert sum(len(target.cells) for target in found) > 100
    for target in found:
        assert len(target.masks) <= len(target.cells)
        if len(target.cells):
            assert target.mask_index.max() < len(target.masks)


@pytest.mark.parametrize("method", ["bilinear", "area"])
def test_an_image_smaller_than_its_canvas(method: str) -> None:
    config = replace(PUBLISHED, mask_resize=method)  # type: ignore[arg-type]
    part = disc(90, 101, 40, 50, 12)
    whole = np.zeros(CANVAS, np.uint8)
    whole[:90, :101] = part
    small = Objects(part[None], np.array([[38, 28, 63, 53]], np.float32), np.array([1]))
    large = Objects(whole[None], small.boxes_xyxy, small.labels)
    for a, b in zip(
        assign_targets(small, CANVAS, HEAD, config, 3),
        assign_targets(large, CANVAS, HEAD, config, 3),
        strict=True,
    ):
        np.testing.assert_array_equal(a.cells, b.cells)
        assert a.masks.shape == b.masks.shape
        if method == "bilinear":
            np.testing.assert_array_equal(a.masks, b.masks)


def test_area_targets_keep_the_covered_fraction() -> None:
    mask = np.zeros((16, 16), np.uint8)
    mask[4:6, 4:8] = 1
    small = resize_mask(mask, 4, "area")
    assert small.shape == (4, 4)
    assert small[1, 1] == pytest.approx(0.5, abs=1 / 255)
    assert small.sum() == pytest.approx(0.5, abs=1 / 255)
    assert resize_mask(np.zeros((16, 16), np.uint8), 4, "area").max() == 0
    assert resize_mask(np.ones((16, 16), np.uint8), 4, "area").min() == 1


def test_bilinear_targets_stay_binary() -> None:
    small = resize_mask(disc(*CANVAS, 40, 40, 21), 8)
    assert set(np.unique(small)) == {0.0, 1.0}


def test_centre_of_mass_by_brute_force() -> None:
    mask = disc(*CANVAS, 70, 90, 40)  # cut by the border
    rows, columns = np.nonzero(mask)
    assert centre_of_mass(mask) == pytest.approx((rows.mean(), columns.mean()), rel=1e-6)


def test_the_centre_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        centre_of_mass(np.zeros((4, 4), np.uint8))


@pytest.mark.parametrize(
    ("position", "size", "grid", "cell"),
    [(0, 96, 12, 0), (95.9, 96, 12, 11), (8, 96, 12, 1), (-3, 96, 12, 0), (-20, 96, 12, -2)],
)
def test_grid_cell(position: float, size: int, grid: int, cell: int) -> None:
    assert grid_cell(position, size, grid) == cell


def test_targets_hold_one_mask_an_object_not_one_a_cell() -> None:
    mask = np.ones(CANVAS, np.uint8)
    found: LevelTargets = assign_targets(objects_of([mask]), CANVAS, HEAD, PAPER, 3)[2]
    assert len(found.cells) > 1
    assert len(found.masks) == 1


@pytest.mark.parametrize("masks", ["region", "contour"])
@pytest.mark.parametrize("seed", range(4))
def test_cropped_masks_give_the_same_targets(masks: str, seed: int) -> None:
    whole = random_objects(seed, 12)
    assert isinstance(whole.masks, np.ndarray)
    crops = CroppedMasks((whole.masks.shape[1], whole.masks.shape[2]), np.uint8)
    boxes = [crops.append(mask) for mask in whole.masks]
    assert boxes == [cv2.boundingRect(mask) for mask in whole.masks]
    assert crops.shape == whole.masks.shape
    np.testing.assert_array_equal(np.stack(crops[:]), whole.masks)
    config = TargetConfig(masks=masks)  # type: ignore[arg-type]
    cropped = replace(whole, masks=crops)
    expected = assign_targets(whole, CANVAS, HEAD, config, 3)
    for a, b in zip(assign_targets(cropped, CANVAS, HEAD, config, 3), expected, strict=True):
        for name in ("labels", "cells", "mask_index", "masks"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("recipe", ["published", "paper"])
@pytest.mark.parametrize("masks", ["region", "contour"])
@pytest.mark.parametrize("method", ["bilinear", "area"])
def test_masks_are_those_of_the_whole_canvas(recipe: str, masks: str, method: str) -> None:
    """Only the blocks around an object are resized, and only its box is kept."""
    strides = (2, 4, 8, 16)
    head = HeadConfig(
        num_grids=(40, 20, 12, 5),
        level_strides=(4, 8, 16, 32),
        mask_strides=strides,
        scale_ranges=((1, 2048),) * 4,
    )
    config = TargetConfig(recipe=recipe, masks=masks, mask_resize=method)  # type: ignore[arg-type]
    rng = np.random.default_rng(5)
    drawn = [
        disc(*CANVAS, rng.uniform(0, 96), rng.uniform(0, 128), rng.uniform(0.5, 50))
        for _ in range(20)
    ]
    drawn += [mask * (rng.random(CANVAS) < 0.7).astype(np.uint8) for mask in drawn]
    objects = objects_of([mask for mask in drawn if mask.any()])
    compared = 0
    for index, mask in enumerate(objects.masks):
        alone = objects_of([mask], [0])
        levels = assign_targets(alone, CANVAS, head, config, 3)
        for target, stride in zip(levels, strides, strict=True):
            assert len(target.masks) == 1, index
            if masks == "region":
                expected = resize_mask(mask, stride, method)
            elif recipe == "paper":
                expected = resize_mask(draw_contour(mask), stride, method)
            else:
                expected = contour_mask(mask, stride, method)
            np.testing.assert_array_equal(target.masks[0], expected)
            compared += bool(expected.any())
    assert compared > 60


def test_memory_grows_with_the_area_of_the_objects() -> None:
    head = HeadConfig(
        num_grids=(64, 32),
        level_strides=(8, 16),
        mask_strides=(4, 8),
        scale_ranges=((1, 2048), (1, 2048)),
    )
    sizes = {}
    for side in (512, 1024):
        masks = CroppedMasks((side, side), np.uint8)
        boxes = []
        for index in range(400):
            y, x = (24 * cell + 8 for cell in divmod(index, 20))
            masks.append(disc(16, 16, 7.5, 7.5, 7), y, x)
            boxes.append((x + 1, y + 1, x + 15, y + 15))
        objects = Objects(masks, np.array(boxes, np.float32), np.zeros(400, np.int64))
        found = assign_targets(objects, (side, side), head, TargetConfig(), 1)
        levels = [t.masks for t in found if isinstance(t.masks, CroppedMasks)]
        assert len(levels) == 2 and len(levels[0]) > 300
        sizes[side] = sum(level.nbytes for level in levels)
        assert sizes[side] < 400 * 16 * 16 < np.asarray(levels[0]).nbytes / 20
    assert sizes[1024] <= sizes[512]  # a coarser grid leaves a few objects without a cell


def test_a_canvas_that_the_strides_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"canvas is \(96, 120\), expected multiples of 16 px"):
        assign_targets(objects_of([]), (96, 120), HEAD, PUBLISHED, 3)
