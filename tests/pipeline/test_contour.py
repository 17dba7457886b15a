"""Contours: drawing, filling, comparison by enclosed region, merging across tiles."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from pipeline.contour import (
    draw_contour,
    fill_contour,
    fill_contours,
    fill_instance,
    join_contours,
)
from pipeline.draw import draw_instances, instance_colour
from pipeline.encode import decode_box, encode_polygons
from pipeline.merge import TileInstance, merge_tiles
from pipeline.model_config import MaskNms, MatrixNms, PostprocessSpec
from pipeline.postprocess import postprocess, select
from pipeline.runs import BoxMask, build_instance
from pipeline.types import Candidates, Detection, Prepared, Tile, Window
from tests.support.tiny import disc

UInt8 = NDArray[np.uint8]
SHAPE = (60, 80)


def border_pixels(mask: UInt8) -> UInt8:
    """Pixels of the mask with a neighbour above, below, left or right that is not in it."""
    padded = np.pad(mask, 1)
    outline = np.zeros_like(mask)
    for y, x in zip(*np.nonzero(mask), strict=True):
        around = (padded[y, x + 1], padded[y + 2, x + 1], padded[y + 1, x], padded[y + 1, x + 2])
        outline[y, x] = not all(around)
    return outline


def instance_of(mask: UInt8, score: float = 0.5, label: int = 0) -> Detection:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(bool)
    height, width = mask.shape
    return build_instance(
        BoxMask(int(rows[0]), int(columns[0]), box), (height, width), label, score
    )


def pixels_of(instance: Detection) -> UInt8:
    return np.asarray(coco_mask.decode(instance.rle), np.uint8)


def blob(seed: int) -> UInt8:
    """Overlapping discs with a hole: several components, concave, truncated at the border."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(SHAPE, np.uint8)
    for _ in range(4):
        mask |= disc(*SHAPE, rng.uniform(0, 60), rng.uniform(0, 80), rng.uniform(1, 18))
    mask &= ~disc(*SHAPE, rng.uniform(0, 60), rng.uniform(0, 80), 5)
    return mask


@pytest.mark.parametrize("seed", range(20))
def test_a_contour_is_the_masks_border(seed: int) -> None:
    mask = blob(seed)
    np.testing.assert_array_equal(draw_contour(mask), border_pixels(mask))


@pytest.mark.parametrize("seed", range(5))
def test_a_contour_of_noise_is_its_border(seed: int) -> None:
    mask = (np.random.default_rng(seed).random(SHAPE) < 0.6).astype(np.uint8)
    np.testing.assert_array_equal(draw_contour(mask), border_pixels(mask))


def test_the_contour_of_one_pixel_and_of_nothing() -> None:
    mask = np.zeros(SHAPE, np.uint8)
    assert not draw_contour(mask).any() and not fill_contour(mask).any()
    mask[7, 9] = 1
    np.testing.assert_array_equal(draw_contour(mask), mask)
    np.testing.assert_array_equal(fill_contour(mask), mask)


@pytest.mark.parametrize("centre", [(30, 40), (0, 0), (59, 40), (2, 79)])
def test_filling_undoes_drawing(centre: tuple[int, int]) -> None:
    mask = disc(*SHAPE, *centre, 14)
    np.testing.assert_array_equal(fill_contour(draw_contour(mask)), mask)


def test_holes_are_drawn_and_filled() -> None:
    mask = disc(*SHAPE, 30, 40, 20)
    ring = mask & ~disc(*SHAPE, 30, 40, 10)
    curve = draw_contour(ring)
    assert curve[30, 40 - 11] and curve[30, 40 - 20] and not curve[30, 40 - 15]
    np.testing.assert_array_equal(fill_contour(curve), mask)


def test_a_gap_of_two_pixels_is_closed_and_a_wide_one_is_not() -> None:
    square = np.zeros(SHAPE, np.uint8)
    square[10:30, 10:30] = 1
    curve = draw_contour(square)
    curve[10, 18:20] = 0
    np.testing.assert_array_equal(fill_contour(curve), square)
    curve[10, 18:24] = 0
    assert fill_contour(curve).sum() < 1.2 * curve.sum()


@pytest.mark.parametrize("seed", range(10))
def test_filling_keeps_the_curve_and_its_box(seed: int) -> None:
    curve = (np.random.default_rng(seed).random(SHAPE) < 0.02).astype(np.uint8)
    filled = fill_contour(curve)
    assert (filled >= curve).all()
    assert instance_of(filled).bbox_xywh == instance_of(curve).bbox_xywh


def test_many_masks_are_filled_as_one_is() -> None:
    curves = np.stack([draw_contour(blob(seed)) for seed in range(4)] + [np.zeros(SHAPE, np.uint8)])
    given = curves.astype(bool)
    filled = fill_contours(given)
    np.testing.assert_array_equal(given, curves.astype(bool))
    for one, curve in zip(filled, curves, strict=True):
        np.testing.assert_array_equal(one, fill_contour(curve).astype(bool))
    assert fill_contours(given[:0]).shape == (0, *SHAPE)


def test_fill_instance_gives_the_enclosed_region() -> None:
    mask = disc(*SHAPE, 30, 40, 12)
    curve = instance_of(draw_contour(mask), 0.7, 3)
    region = fill_instance(curve)
    assert (region.label, region.score, region.bbox_xywh) == (3, 0.7, curve.bbox_xywh)
    assert region.area == mask.sum()
    np.testing.assert_array_equal(pixels_of(region), mask)


def candidates_of(curves: list[UInt8], scores: list[float]) -> Candidates:
    return Candidates(
        np.array(scores, np.float32), np.zeros(len(curves), np.int64), np.stack(curves) * 0.9
    )


@pytest.mark.parametrize("nms", [MatrixNms(), MaskNms()])
def test_a_shifted_duplicate_is_suppressed_by_its_enclosed_region(nms: object) -> None:
    first, second = (draw_contour(disc(*SHAPE, 30, x, 14)) for x in (40, 42))
    other = draw_contour(disc(*SHAPE, 30, 12, 8))
    found = candidates_of([first, second, other], [0.9, 0.8, 0.7])
    spec = PostprocessSpec(nms=nms, compare="masks", update_threshold=0.4)
    assert select(found, spec)[1].tolist() == [0, 1, 2]
    enclosed = spec.model_copy(update={"compare": "enclosed"})
    assert select(found, enclosed)[1].tolist() == [0, 2]


def test_the_result_is_the_curve_not_the_region() -> None:
    mask = disc(16, 16, 8, 8, 5)
    tile = Tile(np.zeros((64, 64, 3), np.uint8), (64, 64), Window(0, 0, 64, 64))
    spec = PostprocessSpec(nms=MatrixNms(), compare="enclosed", mask_threshold=0.3)
    found = candidates_of([draw_contour(mask)], [0.9])
    (instance,) = postprocess(Prepared((64, 64), (tile,)), [found], spec).instances
    pixels = pixels_of(instance)
    assert not pixels[32 - 6 : 32 + 6, 32 - 6 : 32 + 6].any()
    assert pixels[34, 14:56].any() and fill_contour(pixels)[32, 32]


def seen(mask: UInt8, window: Window, score: float) -> TileInstance:
    """The closed contour of the part of an object visible in one tile."""
    part = np.zeros_like(mask)
    here = np.s_[window.y : window.y + window.height, window.x : window.x + window.width]
    part[here] = mask[here]
    cut = bool(part.sum() < mask.sum())
    return TileInstance(instance_of(draw_contour(part), score), window, cut)


LEFT, RIGHT = Window(0, 0, 60, 50), Window(0, 30, 60, 50)


def test_parts_of_two_tiles_are_joined_without_lines_at_the_tile_border() -> None:
    mask = np.zeros(SHAPE, np.uint8)
    mask[20:40, 5:75] = 1
    found = [seen(mask, LEFT, 0.6), seen(mask, RIGHT, 0.8)]
    (joined,) = merge_tiles(found, compare="enclosed")
    assert joined.score == 0.8
    np.testing.assert_array_equal(pixels_of(joined), draw_contour(mask))
    assert (joined.area, joined.bbox_xywh) == (draw_contour(mask).sum(), (5, 20, 70, 20))


def test_an_object_in_two_tiles_gives_one_instance() -> None:
    mask = disc(*SHAPE, 30, 40, 8)
    shifted = disc(*SHAPE, 31, 41, 8)
    found = [seen(mask, LEFT, 0.9), seen(shifted, RIGHT, 0.8)]
    assert len(merge_tiles(found)) == 2  # thin curves share hardly any pixels
    (kept,) = merge_tiles(found, compare="enclosed")
    np.testing.assert_array_equal(pixels_of(kept), draw_contour(mask))


def test_a_truncated_part_is_replaced_by_the_whole_object() -> None:
    mask = disc(*SHAPE, 30, 44, 10)
    found = [seen(mask, LEFT, 0.9), seen(mask, RIGHT, 0.5)]
    (kept,) = merge_tiles(found, compare="enclosed")
    np.testing.assert_array_equal(pixels_of(kept), draw_contour(mask))


@pytest.mark.parametrize("seed", range(10))
def test_joining_removes_inner_pixels_and_adds_none(seed: int) -> None:
    parts = [instance_of(draw_contour(blob(seed + k)), 0.1 * (k + 1)) for k in range(3)]
    joined = join_contours(parts)
    assert joined.score == pytest.approx(0.3)
    pixels, curves = pixels_of(joined), [pixels_of(part) for part in parts]
    assert (pixels <= np.maximum.reduce(curves)).all()
    assert pixels.any() and joined.bbox_xywh == instance_of(pixels).bbox_xywh
    assert join_contours(parts[:1]) == parts[0]


def test_contours_are_drawn_without_fill() -> None:
    image = np.full((*SHAPE, 3), 90, np.uint8)
    curve = draw_contour(disc(*SHAPE, 30, 40, 12))
    drawn = draw_instances(image, [instance_of(curve)], "contour")
    assert (drawn[curve > 0] == instance_colour(0)).all()
    assert (drawn[curve == 0] == 90).all() and (image == 90).all()


def test_the_polygon_of_a_contour_is_the_region_that_it_encloses() -> None:
    mask = disc(*SHAPE, 30, 40, 12)
    instance = instance_of(draw_contour(mask))
    (polygon,) = encode_polygons(instance)
    (rle,) = coco_mask.frPyObjects([polygon], *SHAPE)
    np.testing.assert_array_equal(coco_mask.decode(rle), mask)
    assert decode_box(instance).sum() < mask.sum()
