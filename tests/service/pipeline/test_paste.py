"""Pasting inside boxes against the dense way, and RLE against pycocotools, byte for byte."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from service.pipeline.axis import build_axis, linear_weights
from service.pipeline.paste import paste_masks
from service.pipeline.runs import BoxMask, Outline, build_instance, encode_box_mask
from service.pipeline.types import Float32, Tile, Window
from tests.support.dense_paste import axis_matrix, paste_mask

PARITY = Path(__file__).parents[2] / "data" / "parity"


def _resize_dense(image: np.ndarray, out_h: int, out_w: int) -> np.ndarray:
    """Half-pixel bilinear resize in float64, written on its own."""

    def axis(values: np.ndarray, out: int) -> np.ndarray:
        size = values.shape[0]
        centre = np.clip((np.arange(out) + 0.5) * size / out - 0.5, 0, size - 1)
        low = np.floor(centre).astype(int)
        high = np.minimum(low + 1, size - 1)
        weight = (centre - low)[:, None]
        return np.asarray(values[low] * (1 - weight) + values[high] * weight)

    return np.asarray(axis(axis(image.astype(np.float64), out_h).T, out_w).T)


def _dense(mask: BoxMask | None, height: int, width: int) -> np.ndarray:
    full = np.zeros((height, width), bool)
    if mask is not None:
        h, w = mask.pixels.shape
        full[mask.y : mask.y + h, mask.x : mask.x + w] = mask.pixels
    return full


@pytest.mark.parametrize("seed", range(40))
def test_paste_equals_the_dense_way(seed: int) -> None:
    rng = np.random.default_rng(seed)
    h, w = (int(v) for v in rng.integers(1, 40, 2))
    valid = int(rng.integers(1, 4 * h + 1)), int(rng.integers(1, 4 * w + 1))
    out_h, out_w = (int(v) for v in rng.integers(1, 200, 2))
    probs = cv2.GaussianBlur(rng.random((h, w)).astype(np.float32), (0, 0), 1.5)
    probs = ((probs - probs.min()) / max(np.ptp(probs), 1e-6)).astype(np.float32)
    tile = Tile(np.zeros((4 * h, 4 * w, 3), np.uint8), valid, Window(0, 0, out_h, out_w))
    canvas = _resize_dense(probs, 4 * h, 4 * w)[: valid[0], : valid[1]]
    soft = _resize_dense(canvas, out_h, out_w)
    got = _dense(paste_mask(probs, tile, 4), out_h, out_w)
    decided = np.abs(soft - 0.5) > 1e-4
    np.testing.assert_array_equal(got[decided], (soft > 0.5)[decided])


def test_paste_into_a_window_of_a_larger_image() -> None:
    probs = np.zeros((8, 8), np.float32)
    probs[2:4, 2:4] = 1
    tile = Tile(np.zeros((32, 32, 3), np.uint8), (32, 32), Window(100, 50, 32, 32))
    mask = paste_mask(probs, tile, 4)
    assert mask is not None
    assert (mask.y, mask.x, mask.pixels.shape) == (108, 58, (8, 8))


def test_mask_in_the_padding_alone_is_nothing() -> None:
    probs = np.zeros((8, 8), np.float32)
    probs[6:, 6:] = 1
    tile = Tile(np.zeros((32, 32, 3), np.uint8), (8, 8), Window(0, 0, 8, 8))
    assert paste_mask(probs, tile, 4) is None


def test_empty_mask_is_nothing() -> None:
    tile = Tile(np.zeros((8, 8, 3), np.uint8), (8, 8), Window(0, 0, 8, 8))
    assert paste_mask(np.full((2, 2), 0.5, np.float32), tile, 4) is None


def test_weights_sum_to_one() -> None:
    assert axis_matrix(10, 4, 33, 71).sum(axis=1) == pytest.approx(1, abs=1e-5)
    low, weight = linear_weights(1, 5)
    assert not low.any() and not weight.any()


def _boxed(mask: np.ndarray) -> BoxMask:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    inside = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return BoxMask(int(rows[0]), int(columns[0]), inside.astype(bool))


def test_rle_equals_pycocotools_on_the_fixtures() -> None:
    masks = np.load(PARITY / "masks.npz")
    expected = {row["name"]: row for row in json.loads((PARITY / "rle.json").read_text())["masks"]}
    checked = 0
    for name, row in expected.items():
        if masks[name].any():
            rle = encode_box_mask(_boxed(masks[name]), masks[name].shape)
            assert rle["counts"].decode() == row["counts"], name
            checked += 1
    assert checked > 8


@pytest.mark.parametrize("seed", range(20))
def test_rle_equals_pycocotools_on_noise(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random(tuple(rng.integers(1, 30, 2))) < rng.random()
    mask[0, 0] |= not mask.any()
    expected = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    instance = build_instance(_boxed(mask), mask.shape, 0, 0.5)
    assert instance.rle["counts"] == expected["counts"]
    assert instance.area == coco_mask.area(expected)
    assert list(instance.bbox_xywh) == coco_mask.toBbox(expected).tolist()


def test_a_hundred_masks_of_a_large_photograph_stay_small() -> None:
    """DESIGN: 100 masks at 3024x4032 in at most 200 MB extra."""
    tile = Tile(np.zeros((800, 1088, 3), np.uint8), (800, 1067), Window(0, 0, 3024, 4032))
    rng = np.random.default_rng(0)
    probs = np.zeros((200, 272), np.float32)
    probs[5:195, 5:260] = 1
    build_axis.cache_clear()
    tracemalloc.start()
    instances = []
    for _ in range(100):
        noisy = probs * rng.uniform(0.6, 1.0)
        mask = paste_mask(noisy.astype(np.float32), tile, 4)
        assert mask is not None
        instances.append(build_instance(mask, (3024, 4032), 0, 0.9))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(instances) == 100
    assert peak < 200 * 1024**2
