"""Targets of detection contours."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

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
from training.targets import UInt8, assign_targets, contour_mask, resize_mask

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
