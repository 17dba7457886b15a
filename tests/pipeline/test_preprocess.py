"""Resize, pad, tile and contrast rules."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline import preprocess
from pipeline.model_config import ContrastSpec, InputSpec, KeepRatioResize, TileResize
from pipeline.preprocess import (
    contrast_table,
    keep_ratio_size,
    needed_hw,
    prepare,
    stretch_contrast,
    tile_starts,
)

PARITY = Path(__file__).parents[1] / "data" / "parity"
TILES = InputSpec(resize=TileResize(scale=2.0, tile_hw=(32, 32), overlap_px=8))


def test_sizes_equal_the_published_table() -> None:
    table = json.loads((PARITY / "resize_table.json").read_text())["table"]
    for name, rows in table.items():
        long_side, short_side = (int(v) for v in name.split("x"))
        spec = InputSpec(resize=KeepRatioResize(short_side=short_side, long_side=long_side))
        for h, w, new_h, new_w, pad_h, pad_w in rows:
            assert keep_ratio_size((h, w), short_side, long_side) == (new_h, new_w)
            if h * w <= 640 * 640:
                tile = prepare(np.zeros((h, w, 3), np.uint8), spec).tiles[0]
                assert tile.image.shape == (pad_h, pad_w, 3)
                assert tile.valid_hw == (new_h, new_w)


@pytest.mark.parametrize("index", [0, 1])
def test_pixels_equal_the_published_resize(index: int) -> None:
    data = np.load(PARITY / "preprocess.npz")
    image = np.ascontiguousarray(data[f"bgr{index}"][..., ::-1])
    expected = data[f"resized{index}"][..., ::-1]
    height, width = expected.shape[:2]
    spec = KeepRatioResize(short_side=min(height, width), long_side=max(height, width))
    tile = prepare(image, InputSpec(resize=spec)).tiles[0]
    assert tile.valid_hw == (height, width)
    np.testing.assert_array_equal(tile.image[:height, :width], expected)
    assert not tile.image[height:].any() and not tile.image[:, width:].any()


@pytest.mark.parametrize(
    ("length", "starts"), [(1, [0]), (32, [0]), (33, [0, 1]), (56, [0, 24]), (100, [0, 23, 45, 68])]
)
def test_tile_starts(length: int, starts: list[int]) -> None:
    assert tile_starts(length, 32, 8) == starts


def test_tiles_cover_the_image_with_their_overlap() -> None:
    for length in range(1, 400):
        starts = tile_starts(length, 32, 8)
        assert starts[0] == 0
        assert starts[-1] + min(32, length) == length
        steps = np.diff(starts)
        assert (steps <= 24).all() and (steps > 0).all()


def test_small_image_is_one_padded_tile() -> None:
    prepared = prepare(np.full((1, 1, 3), 7, np.uint8), TILES)
    (tile,) = prepared.tiles
    assert tile.image.shape == (64, 64, 3)
    assert tile.valid_hw == (2, 2)
    assert tile.image.sum() == 7 * 3 * 4
    assert tile.shared == (None, None, None, None)


def test_inner_borders_are_marked() -> None:
    prepared = prepare(np.zeros((56, 32, 3), np.uint8), TILES)
    assert [t.shared for t in prepared.tiles] == [(None, None, 8, None), (8, None, None, None)]


@pytest.mark.parametrize("image_hw", [(33, 70), (100, 57), (80, 80)])
def test_what_a_tile_shares_with_the_next_ones(image_hw: tuple[int, int]) -> None:
    windows = {
        (t.window.y, t.window.x): t
        for t in prepare(np.zeros((*image_hw, 3), np.uint8), TILES).tiles
    }
    rows, columns = sorted({y for y, _ in windows}), sorted({x for _, x in windows})
    for (y, x), tile in windows.items():
        row, column = rows.index(y), columns.index(x)
        assert tile.shared == (
            rows[row - 1] + 32 - y if row else None,
            columns[column - 1] + 32 - x if column else None,
            y + 32 - rows[row + 1] if y != rows[-1] else None,
            x + 32 - columns[column + 1] if x != columns[-1] else None,
        )


def test_tile_does_not_depend_on_its_neighbours() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (56, 32, 3), np.uint8)
    alone = prepare(np.ascontiguousarray(image[:32]), TILES).tiles[0]
    np.testing.assert_array_equal(prepare(image, TILES).tiles[0].image, alone.image)


def test_contrast_stretches_a_dark_image() -> None:
    rng = np.random.default_rng(0)
    dark = np.repeat(rng.integers(2, 40, (64, 64, 1), np.uint8), 3, axis=2)
    spec = ContrastSpec(low=0.5, high=99.8, min_range=16)
    bright = stretch_contrast(dark, spec)
    assert bright.min() == 0 and bright.max() == 255
    order = np.argsort(dark[..., 0].ravel(), kind="stable")
    assert (np.diff(bright[..., 0].ravel()[order].astype(int)) >= 0).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (40, 7)])
def test_the_table_has_the_percentiles_of_all_grey_values(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess, "_STRIPE_PIXELS", 13)
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    spec = ContrastSpec(low=1, high=98, min_range=20)
    low, high = np.percentile(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), [1, 98])
    mapped = (np.arange(256) - low) * (255.0 / max(high - low, 20))
    expected = np.clip(np.floor(mapped + 0.5), 0, 255).astype(np.uint8)
    assert np.array_equal(contrast_table(image, spec), expected)


def test_contrast_leaves_a_flat_image_flat() -> None:
    flat = np.full((8, 8, 3), 9, np.uint8)
    assert np.ptp(stretch_contrast(flat, ContrastSpec(low=1, high=99))) == 0


def test_contrast_does_not_blow_up_noise() -> None:
    noise = np.repeat(np.random.default_rng(0).integers(5, 8, (32, 32, 1), np.uint8), 3, axis=2)
    stretched = stretch_contrast(noise, ContrastSpec(low=0.5, high=99.8, min_range=51))
    assert np.ptp(stretched) <= 2 * 5


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)],
)
def test_wrong_arrays_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        prepare(image, TILES)


def test_an_image_decoded_smaller_has_the_canvas_and_window_of_the_original() -> None:
    spec = InputSpec(resize=KeepRatioResize(short_side=32, long_side=64))
    image = np.full((301, 403, 3), 200, np.uint8)
    assert needed_hw((301, 403), spec) == (32, 43)
    (exact,) = prepare(image, spec).tiles
    smaller = prepare(image[:38, :51], spec, image_hw=(301, 403))
    assert smaller.image_hw == (301, 403)
    (tile,) = smaller.tiles
    assert (tile.window, tile.valid_hw) == (exact.window, exact.valid_hw)
    np.testing.assert_array_equal(tile.image, exact.image)


def test_tiles_need_the_image_as_it_is() -> None:
    assert needed_hw((1000, 2000), TILES) == (0, 0)
    with pytest.raises(ValueError, match=r"\(64, 64\), not from \(32, 32\)"):
        prepare(np.zeros((32, 32, 3), np.uint8), TILES, image_hw=(64, 64))
