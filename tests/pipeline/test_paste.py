"""`paste_masks` against a dense reference implementation, pixel by pixel."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from pipeline import paste
from pipeline.axis import build_axis
from pipeline.paste import paste_masks
from pipeline.runs import EncodedMask, build_instance
from pipeline.types import Float32, Tile, Window
from tests.support.dense_paste import paste_mask
from tests.support.kernel_cases import (
    TIE,
    draw_image_hw,
    draw_masks,
    draw_special_masks,
    draw_tile,
    exact_probs,
)


def _resize_dense(image: np.ndarray, out_h: int, out_w: int) -> np.ndarray:
    """Half-pixel bilinear resize in float64, independent of the implementation under test."""

    def axis(values: np.ndarray, out: int) -> np.ndarray:
        size = values.shape[0]
        centre = np.clip((np.arange(out) + 0.5) * size / out - 0.5, 0, size - 1)
        low = np.floor(centre).astype(int)
        high = np.minimum(low + 1, size - 1)
        weight = (centre - low)[:, None]
        return np.asarray(values[low] * (1 - weight) + values[high] * weight)

    return np.asarray(axis(axis(image.astype(np.float64), out_h).T, out_w).T)


def _paste(probs: Float32, tile: Tile, image_hw: tuple[int, int]) -> EncodedMask | None:
    (outline,) = paste_masks([probs], tile, 4, image_hw)
    return outline


def _dense(outline: EncodedMask | None, height: int, width: int) -> np.ndarray:
    if outline is None:
        return np.zeros((height, width), np.bool_)
    return np.asarray(coco_mask.decode(outline.rle) > 0)


@pytest.mark.parametrize("seed", range(40))
def test_paste_equals_the_dense_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    h, w = (int(v) for v in rng.integers(1, 40, 2))
    valid = int(rng.integers(1, 4 * h + 1)), int(rng.integers(1, 4 * w + 1))
    out_h, out_w = (int(v) for v in rng.integers(1, 200, 2))
    probs = cv2.GaussianBlur(rng.random((h, w)).astype(np.float32), (0, 0), 1.5)
    probs = ((probs - probs.min()) / max(np.ptp(probs), 1e-6)).astype(np.float32)
    tile = Tile(np.zeros((4 * h, 4 * w, 3), np.uint8), valid, Window(0, 0, out_h, out_w))
    canvas = _resize_dense(probs, 4 * h, 4 * w)[: valid[0], : valid[1]]
    soft = _resize_dense(canvas, out_h, out_w)
    got = _dense(_paste(probs, tile, (out_h, out_w)), out_h, out_w)
    decided = np.abs(soft - 0.5) > 1e-4
    np.testing.assert_array_equal(got[decided], (soft > 0.5)[decided])


def test_paste_into_a_window_of_a_larger_image() -> None:
    probs = np.zeros((8, 8), np.float32)
    probs[2:4, 2:4] = 1
    tile = Tile(np.zeros((32, 32, 3), np.uint8), (32, 32), Window(100, 50, 32, 32))
    outline = _paste(probs, tile, (200, 300))
    assert outline is not None
    assert outline.bbox_xywh == (58, 108, 8, 8)


def test_a_mask_only_in_the_padding_gives_none() -> None:
    probs = np.zeros((8, 8), np.float32)
    probs[6:, 6:] = 1
    tile = Tile(np.zeros((32, 32, 3), np.uint8), (8, 8), Window(0, 0, 8, 8))
    assert _paste(probs, tile, (8, 8)) is None


def test_an_empty_mask_gives_none() -> None:
    tile = Tile(np.zeros((8, 8, 3), np.uint8), (8, 8), Window(0, 0, 8, 8))
    assert _paste(np.full((2, 2), 0.5, np.float32), tile, (8, 8)) is None


def _assert_equal(
    masks: Sequence[Float32],
    tile: Tile,
    stride: int,
    image_hw: tuple[int, int],
    threshold: float = 0.5,
) -> int:
    """Each mask's RLE equals the dense reference, except at near-ties with the threshold.

    Returns:
        How many masks differ in such pixels.
    """
    found = list(paste_masks(masks, tile, stride, image_hw, threshold))
    assert len(found) == len(masks)
    ties = 0
    for probs, outline in zip(masks, found, strict=True):
        box = paste_mask(probs, tile, stride, threshold)
        if box is not None and outline is not None:
            expected = build_instance(box, image_hw, 0, 1.0)
            if (expected.rle, expected.bbox_xywh, expected.area) == outline:
                continue
        elif box is None and outline is None:
            continue
        ties += 1
        here = np.zeros(image_hw, np.bool_)
        if box is not None:
            h, w = box.pixels.shape
            here[box.y : box.y + h, box.x : box.x + w] = box.pixels
        unequal = here != _dense(outline, *image_hw)
        window = tile.window
        region = np.s_[window.y : window.y + window.height, window.x : window.x + window.width]
        assert unequal.sum() == unequal[region].sum()
        exact = exact_probs(probs, tile)[unequal[region]]
        assert (np.abs(exact - threshold) < TIE).all()
    return ties


@settings(max_examples=150, deadline=None)
@given(
    hw=st.tuples(st.integers(1, 40), st.integers(2, 40)),
    stride=st.sampled_from([1, 2, 4, 8]),
    threshold=st.sampled_from([0.5, 0.05, 0.95]),
    seed=st.integers(0, 100_000),
)
def test_blobs_and_noise(hw: tuple[int, int], stride: int, threshold: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tile = draw_tile(rng, hw, stride)
    noise = rng.random((2, *hw)).astype(np.float32)
    masks = [*draw_masks(rng, 4, hw), *noise, (noise[0] > 0.7).astype(np.float32)]
    assert _assert_equal(masks, tile, stride, draw_image_hw(rng, tile), threshold) <= 1


@settings(max_examples=80, deadline=None)
@given(
    hw=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    stride=st.sampled_from([1, 2, 4, 8]),
    whole=st.booleans(),
    seed=st.integers(0, 100_000),
)
def test_special_masks(hw: tuple[int, int], stride: int, whole: bool, seed: int) -> None:
    """Empty, full, one pixel, borders, ties; also in a window that covers the whole image."""
    rng = np.random.default_rng(seed)
    tile = draw_tile(rng, hw, stride)
    image_hw = draw_image_hw(rng, tile)
    if whole:
        window = tile.window
        tile = Tile(tile.image, tile.valid_hw, Window(0, 0, window.height, window.width))
        image_hw = (window.height, window.width)
    _assert_equal(list(draw_special_masks(hw)), tile, stride, image_hw)


@pytest.mark.parametrize("count", [0, 1, 400])
def test_chunking_does_not_change_results(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(count)
    tile = draw_tile(rng, (24, 30), 4)
    image_hw = draw_image_hw(rng, tile)
    masks = draw_masks(rng, count, (24, 30))
    together = list(paste_masks(masks, tile, 4, image_hw))
    assert together == [o for mask in masks for o in paste_masks([mask], tile, 4, image_hw)]
    monkeypatch.setattr(paste, "CHUNK", 100)
    assert together == list(paste_masks(masks, tile, 4, image_hw))


def test_a_full_mask_is_one_run() -> None:
    tile = Tile(np.zeros((64, 96, 3), np.uint8), (64, 96), Window(0, 0, 100, 150))
    outline = _paste(np.ones((16, 24), np.float32), tile, (100, 150))
    assert outline is not None
    assert outline.bbox_xywh == (0, 0, 150, 100)
    assert outline.area == 15000


def test_a_hundred_masks_of_a_large_photograph_stay_small() -> None:
    """100 masks at 3024x4032 need at most 200 MB of extra memory."""
    tile = Tile(np.zeros((800, 1088, 3), np.uint8), (800, 1067), Window(0, 0, 3024, 4032))
    rng = np.random.default_rng(0)
    probs = np.zeros((200, 272), np.float32)
    probs[5:195, 5:260] = 1
    build_axis.cache_clear()
    tracemalloc.start()
    masks = (probs * np.float32(rng.uniform(0.6, 1.0)) for _ in range(100))
    outlines = list(paste_masks(masks, tile, 4, (3024, 4032)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(outlines) == 100
    assert all(outlines)
    assert peak < 200 * 1024**2


def test_noise_in_a_large_photograph_stays_small() -> None:
    """Every mask pixel is an edge, so every output is computed."""
    tile = Tile(np.zeros((800, 1088, 3), np.uint8), (800, 1067), Window(0, 0, 3024, 4032))
    noise = np.random.default_rng(0).random((200, 272)).astype(np.float32)
    build_axis.cache_clear()
    tracemalloc.start()
    (outline,) = paste_masks([noise], tile, 4, (3024, 4032))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert outline is not None
    assert peak < 200 * 1024**2
