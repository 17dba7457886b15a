from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from pipeline.contour import draw_contour
from tests.support.tiny import disc
from training.configs.schema import HeadConfig, TargetConfig
from training.targets import (
    CroppedMasks,
    LevelTargets,
    Objects,
    UInt8,
    assign_targets,
    centre_of_mass,
    contour_mask,
    grid_cell,
    resize_mask,
)

CANVAS = (96, 128)
HEAD = HeadConfig(
    num_grids=(12, 8, 5),
    level_strides=(8, 16, 32),
    mask_strides=(4, 8, 16),
    scale_ranges=((1, 32), (16, 64), (48, 2048)),
)
PUBLISHED = TargetConfig(recipe="published")
PAPER = TargetConfig(recipe="paper")


def objects_of(masks: list[UInt8], labels: list[int] | None = None) -> Objects:
    boxes = np.zeros((len(masks), 4), np.float32)
    for row, mask in zip(boxes, masks, strict=True):
        rows, columns = np.nonzero(mask)
        if rows.size:
            row[:] = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    stack = np.stack(masks) if masks else np.zeros((0, *CANVAS), np.uint8)
    numbers = np.arange(len(masks)) % 3 if labels is None else np.array(labels)
    return Objects(stack, boxes, numbers.astype(np.int64))


def random_objects(seed: int, count: int) -> Objects:
    rng = np.random.default_rng(seed)
    masks = []
    for _ in range(count):
        mask = disc(*CANVAS, rng.uniform(0, 96), rng.uniform(0, 128), rng.uniform(1, 60))
        mask[: int(rng.integers(0, 96))] = 0
        masks.append(mask)
    return objects_of(masks)


def brute_force(
    objects: Objects, head: HeadConfig, config: TargetConfig
) -> list[tuple[np.ndarray, dict[int, int]]]:
    """Labels and owner of every cell, from the paper's text, cell by cell."""
    results = []
    for grid, (low, high) in zip(head.num_grids, head.scale_ranges, strict=True):
        labels = np.full((grid, grid), 3, np.int64)
        owner: dict[int, int] = {}
        for index, mask in enumerate(objects.masks):
            x1, y1, x2, y2 = objects.boxes_xyxy[index]
            if not mask.any() or not low <= np.sqrt((x2 - x1) * (y2 - y1)) <= high:
                continue
            rows, columns = np.nonzero(mask)
            spans = {0: (rows, y2 - y1), 1: (columns, x2 - x1)}
            covered: list[set[int]] = []
            for axis, (positions, box_span) in spans.items():
                span = (
                    positions.max() + 1 - positions.min() if config.recipe == "paper" else box_span
                )
                size, centre = CANVAS[axis], positions.mean()
                half = 0.5 * 0.2 * span
                inside = set()
                for cell in range(grid):
                    begin, end = cell * size / grid, (cell + 1) * size / grid
                    near = abs(cell - int(centre / size * grid)) <= 1
                    overlaps = centre + half >= begin and centre - half < end
                    if overlaps and (near or config.recipe == "paper"):
                        inside.add(cell)
                covered.append(inside)
            for i in covered[0]:
                for j in covered[1]:
                    labels[i, j] = objects.labels[index]
                    owner[i * grid + j] = index
        results.append((labels, owner))
    return results


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


CONTOUR = replace(PUBLISHED, masks="contour")


def contour_by_brute_force(mask: UInt8, stride: int) -> np.ndarray:
    """Small pixels that are in, with a neighbour above, below, left or right that is out."""
    inside = np.pad(resize_mask(mask, stride) > 0.5, 1)
    core = inside[1:-1, 1:-1]
    surrounded = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    return np.asarray(core & ~surrounded, np.float32)


@pytest.mark.parametrize("seed", range(8))
def test_contour_targets_against_brute_force(seed: int) -> None:
    objects = random_objects(seed, 9)
    found = assign_targets(objects, CANVAS, HEAD, CONTOUR, 3)
    regions = assign_targets(objects, CANVAS, HEAD, PUBLISHED, 3)
    compared = 0
    for level, (labels, owner) in enumerate(brute_force(objects, HEAD, CONTOUR)):
        target, region = found[level], regions[level]
        np.testing.assert_array_equal(target.labels, labels)
        np.testing.assert_array_equal(target.cells, region.cells)
        np.testing.assert_array_equal(target.mask_index, region.mask_index)
        assert target.masks.shape == region.masks.shape and target.masks.dtype == np.float32
        for cell, row in zip(target.cells, target.mask_index, strict=True):
            wanted = contour_by_brute_force(objects.masks[owner[cell]], HEAD.mask_strides[level])
            if wanted.any():  # else an object smaller than a mask pixel: tested below
                np.testing.assert_array_equal(target.masks[row], wanted)
                compared += 1
    assert compared > 3


@pytest.mark.parametrize("method", ["bilinear", "area"])
@pytest.mark.parametrize("position", [(0, 0), (95, 127), (50, 63), (49, 62)])
def test_one_pixel_has_a_contour(position: tuple[int, int], method: str) -> None:
    mask = np.zeros(CANVAS, np.uint8)
    mask[position] = 1
    for stride in (2, 4, 8, 16):
        small = contour_mask(mask, stride, method)
        assert small.shape == (96 // stride, 128 // stride)
        assert np.argwhere(small).tolist() == [[position[0] // stride, position[1] // stride]]


def test_a_line_thinner_than_a_mask_pixel_stays_whole() -> None:
    mask = np.zeros(CANVAS, np.uint8)
    mask[33, 10:90] = 1
    small = contour_mask(mask, 4, "area")
    assert small[8].tolist() == [float(2 <= x < 23) for x in range(32)]
    assert small.sum() == 21


def test_contours_of_holes_and_of_several_parts() -> None:
    mask = np.zeros(CANVAS, np.uint8)
    mask[8:72, 8:72] = 1
    mask[24:56, 24:56] = 0
    mask[80:92, 100:112] = 1
    small = contour_mask(mask, 4, "area")
    outer, hole, part = 4 * 15, 4 * 9, 4 * 2
    assert small.sum() == outer + (hole - 4) + part  # a hole's contour has no corner pixels
    assert small[2, 2:18].all() and small[5, 6:14].all() and small[20:23, 25:28].sum() == 8
    assert not small[10, 4] and not small[10, 10] and not small[21, 26]


@pytest.mark.parametrize("method", ["bilinear", "area"])
def test_the_contour_of_an_object_that_the_image_cuts_is_closed(method: str) -> None:
    part = np.zeros((88, 100), np.uint8)
    part[40:, 60:] = 1
    objects = objects_of([part])
    config = replace(CONTOUR, mask_resize=method)  # type: ignore[arg-type]
    (masks,) = [
        np.asarray(t.masks)
        for t in assign_targets(objects, CANVAS, HEAD, config, 3)
        if len(t.cells)
    ]
    stride = 96 // masks.shape[1]
    whole = np.zeros(CANVAS, np.uint8)
    whole[:88, :100] = part
    np.testing.assert_array_equal(masks[0], contour_mask(whole, stride, method))
    bottom, right = -(-88 // stride) - 1, 100 // stride - 1
    assert masks[0][bottom, 60 // stride + 1 : right].all()


def test_a_contour_lies_inside_its_region() -> None:
    for seed in range(10):
        mask = random_objects(seed, 1).masks[0]
        region = resize_mask(mask, 4) > 0
        assert (contour_mask(mask, 4) <= region).all()


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


def test_the_papers_contour_is_found_on_the_canvas_and_then_resized() -> None:
    """Section 6: the contour is the mask, and everything after that is unchanged."""
    whole = disc(*CANVAS, 40, 60, 30)
    outline = np.zeros_like(whole)
    inner = np.zeros_like(whole)
    inner[1:-1, 1:-1] = (
        whole[:-2, 1:-1] & whole[2:, 1:-1] & whole[1:-1, :-2] & whole[1:-1, 2:] & whole[1:-1, 1:-1]
    )
    outline[:] = whole & ~inner & 1
    for method in ("bilinear", "area"):
        config = replace(PAPER, masks="contour", mask_resize=method)
        for target, stride in zip(
            assign_targets(objects_of([whole]), CANVAS, HEAD, config, 3),
            HEAD.mask_strides,
            strict=True,
        ):
            for mask in target.masks:
                np.testing.assert_array_equal(mask, resize_mask(outline, stride, method))
    finest = replace(HEAD, scale_ranges=((1, 2048), (1, 2048), (1, 2048)))
    paper, ours = (
        assign_targets(objects_of([whole]), CANVAS, finest, replace(c, masks="contour"), 3)[0]
        for c in (PAPER, PUBLISHED)
    )
    sums = [np.asarray(target.masks).sum() for target in (paper, ours)]
    assert 0 < sums[0] != sums[1]


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


def test_cropped_masks_as_an_array() -> None:
    masks = CroppedMasks((4, 6), np.float32)
    assert np.asarray(masks).shape == masks.shape == (0, 4, 6)
    assert masks.append(np.zeros((2, 2), np.float32), 1, 3) == (0, 0, 0, 0)
    assert masks.append(np.array([[0, 0.25], [0, 0.5]], np.float32), 1, 3) == (4, 1, 1, 2)
    whole = np.zeros((2, 4, 6), np.float32)
    whole[1, 1:3, 4] = 0.25, 0.5
    np.testing.assert_array_equal(masks, whole)
    assert np.asarray(masks).dtype == np.float32 and masks.nbytes == 8
    assert np.asarray(masks, np.float64).dtype == np.float64
    np.testing.assert_array_equal(masks[-1], whole[1])
    with pytest.raises(IndexError):
        masks[2]
