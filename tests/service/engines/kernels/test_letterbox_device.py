"""The letterbox kernel against OpenCV's resize: the same bytes."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.model_config import InputSpec, KeepRatioResize, TileResize
from pipeline.preprocess import prepare
from pipeline.types import Prepared, UInt8, Window
from service.engines.kernels.launcher import Launcher
from service.engines.kernels.letterbox import letterbox
from tests.support.kernel_host import Uploads


def draw_image(hw: tuple[int, int], seed: int = 0) -> UInt8:
    return np.random.default_rng(seed).integers(0, 256, (*hw, 3), dtype=np.uint8)


def assert_tiles_equal(
    launcher: Launcher, uploads: Uploads, image: UInt8, prepared: Prepared
) -> None:
    source = uploads.put(image)
    for tile in prepared.tiles:
        height, width = tile.image.shape[:2]
        canvas = uploads.poisoned(tile.image.nbytes)
        letterbox(
            launcher,
            source,
            prepared.image_hw,
            tile.window,
            canvas,
            (height, width),
            tile.valid_hw,
            uploads.stream,
        )
        found = uploads.get(canvas, tile.image.nbytes).reshape(tile.image.shape)
        np.testing.assert_array_equal(found, tile.image)


@pytest.mark.parametrize(
    "hw",
    [(48, 64), (97, 33), (200, 301), (333, 500), (64, 64), (1, 1), (1, 90), (70, 2), (128, 128)],
)
@pytest.mark.parametrize("short_side", [31, 64, 129])
def test_whole_images(
    launcher: Launcher, uploads: Uploads, hw: tuple[int, int], short_side: int
) -> None:
    """Portrait and landscape, smaller, larger and exactly half as large."""
    image = draw_image(hw)
    resize = KeepRatioResize(short_side=short_side, long_side=2 * short_side)
    assert_tiles_equal(launcher, uploads, image, prepare(image, InputSpec(resize=resize)))


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.5, 1.37])
@pytest.mark.parametrize("hw", [(150, 170), (40, 140), (64, 64)])
def test_tiles(launcher: Launcher, uploads: Uploads, scale: float, hw: tuple[int, int]) -> None:
    image = draw_image(hw, 1)
    resize = TileResize(scale=scale, tile_hw=(64, 64), overlap_px=16)
    prepared = prepare(image, InputSpec(resize=resize))
    assert_tiles_equal(launcher, uploads, image, prepared)


@pytest.mark.parametrize("value", [0, 255])
def test_extremes_do_not_wrap(launcher: Launcher, uploads: Uploads, value: int) -> None:
    image = np.full((50, 70, 3), value, np.uint8)
    resize = KeepRatioResize(short_side=77, long_side=200)
    assert_tiles_equal(launcher, uploads, image, prepare(image, InputSpec(resize=resize)))


@pytest.mark.slow
def test_random_sizes(launcher: Launcher, uploads: Uploads) -> None:
    rng = np.random.default_rng(2)
    for seed in range(60):
        hw = int(rng.integers(1, 400)), int(rng.integers(1, 400))
        image = draw_image(hw, seed)
        short = int(rng.integers(1, 300))
        resize = KeepRatioResize(short_side=short, long_side=short * 2)
        assert_tiles_equal(launcher, uploads, image, prepare(image, InputSpec(resize=resize)))


def test_regions_that_do_not_fit_are_refused(launcher: Launcher) -> None:
    def call(window: Window, valid_hw: tuple[int, int]) -> None:
        letterbox(launcher, 0, (20, 30), window, 0, (32, 32), valid_hw, 0)

    for window in (Window(0, 1, 20, 30), Window(-1, 0, 5, 5), Window(0, 0, 0, 5)):
        with pytest.raises(ValueError, match="is not in an image"):
            call(window, (8, 8))
    for valid_hw in ((33, 8), (8, 0)):
        with pytest.raises(ValueError, match="do not fit a canvas"):
            call(Window(0, 0, 20, 30), valid_hw)
