"""The scale of a request: the same canvases, other windows."""

from __future__ import annotations

import json
from typing import Any

import cv2
import numpy as np
import pytest

from pipeline.model_config import MAX_ZOOM, ModelConfig, TileResize
from pipeline.preprocess import count_canvases, prepare
from pipeline.repository_config import parse_model_config
from pipeline.scale import ScaleError, fit_scale
from tests.support.blob_model import KEEP_RATIO_INPUT, build_graph, model_config

CARD = {"object_size_px": 16.0, "um_per_px": 0.5}


def _config(resize: dict[str, Any] | None = None, card: dict[str, Any] = CARD) -> ModelConfig:
    content = model_config(build_graph())
    changes = {"card": card, **({"input": {"resize": resize}} if resize else {})}
    return parse_model_config(json.dumps({**content, **changes})).for_version(1)


def _tiles(scale: float, height: int, width: int, overlap: int) -> dict[str, Any]:
    return {"rule": "tile", "scale": scale, "tile_hw": [height, width], "overlap_px": overlap}


CONFIG = _config()


def test_no_scale_or_the_models_own_changes_nothing() -> None:
    assert fit_scale(CONFIG) is CONFIG
    choices: list[dict[str, Any]] = [{"object_size_px": 16.0}, {"um_per_px": 0.5}]
    for asked in choices:
        same = fit_scale(CONFIG, **asked)
        assert same.input.zoom == 1
        image = np.random.default_rng(0).integers(0, 256, (150, 130, 3), np.uint8)
        pairs = zip(
            prepare(image, CONFIG.input).tiles, prepare(image, same.input).tiles, strict=True
        )
        for ours, theirs in pairs:
            np.testing.assert_array_equal(ours.image, theirs.image)
            assert (ours.window, ours.valid_hw) == (theirs.window, theirs.valid_hw)


@pytest.mark.parametrize("asked", [{"object_size_px": 32.0}, {"um_per_px": 0.25}])
def test_larger_objects_are_shown_smaller(asked: dict[str, Any]) -> None:
    resize = fit_scale(CONFIG, **asked).input.resize
    assert isinstance(resize, TileResize)
    assert (resize.tile_hw, resize.overlap_px, resize.scale) == ((128, 128), 32, 1.0)
    assert resize.canvas_hw == (128, 128)


def test_an_enlarged_image_at_its_scale_gives_nearly_the_same_canvas() -> None:
    image = cv2.GaussianBlur(
        np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.float32), (0, 0), 3
    ).astype(np.uint8)
    large = np.asarray(cv2.resize(image, (128, 128), interpolation=cv2.INTER_LINEAR), np.uint8)
    (usual,) = prepare(image, CONFIG.input).tiles
    (shown,) = prepare(large, fit_scale(CONFIG, object_size_px=32).input).tiles
    assert shown.valid_hw == usual.valid_hw
    assert abs(shown.image.astype(int) - usual.image).max() <= 1


@pytest.mark.parametrize("tile_hw", [(64, 64), (61, 97), (33, 20)])
@pytest.mark.parametrize("zoom", [1 / MAX_ZOOM, 0.31, 0.77, 1.01, 1.7, 3.3, MAX_ZOOM])
@pytest.mark.parametrize("image_hw", [(1, 1), (5, 300), (211, 190)])
def test_canvases_keep_their_shape_and_cover_the_image(
    tile_hw: tuple[int, int], zoom: float, image_hw: tuple[int, int]
) -> None:
    config = _config(_tiles(2.0, *tile_hw, 8))
    scaled = fit_scale(config, object_size_px=16 / zoom).input
    assert scaled.zoom == pytest.approx(zoom, rel=0.2)
    tiles = prepare(np.full((*image_hw, 3), 200, np.uint8), scaled).tiles
    assert len(tiles) == count_canvases(image_hw, scaled)
    seen = np.zeros(image_hw, np.bool_)
    for tile in tiles:
        w = tile.window
        assert tile.image.shape == (2 * tile_hw[0], 2 * tile_hw[1], 3)
        assert (tile.image[: tile.valid_hw[0], : tile.valid_hw[1]] == 200).all()
        assert tile.valid_hw[0] / w.height == pytest.approx(scaled.resize.scale, abs=1 / w.height)  # type: ignore[union-attr]
        seen[w.y : w.y + w.height, w.x : w.x + w.width] = True
    assert seen.all()


@pytest.mark.parametrize(
    ("config", "asked", "match"),
    [
        (CONFIG, {"object_size_px": 8.0, "um_per_px": 1.0}, "give one"),
        (CONFIG, {"object_size_px": 3.9}, r"object_size_px 3.9 is not in 4 to 64;.*has 16$"),
        (CONFIG, {"um_per_px": 2.1}, r"um_per_px 2.1 is not in 0.125 to 2;"),
        (_config(card={}), {"object_size_px": 8.0}, "'blobs' states no object_size_px"),
        (
            _config(card={"object_size_px": 8}),
            {"um_per_px": 1.0},
            "um_per_px: .*states no",
        ),
        (_config(KEEP_RATIO_INPUT["resize"]), {"object_size_px": 16.0}, "no fixed scale"),
    ],
)
def test_an_impossible_scale_is_named(
    config: ModelConfig, asked: dict[str, Any], match: str
) -> None:
    with pytest.raises(ScaleError, match=match):
        fit_scale(config, **asked)


@pytest.mark.parametrize("edge", [4.0, 64.0])
def test_the_bounds_are_allowed(edge: float) -> None:
    assert fit_scale(CONFIG, object_size_px=edge).input.zoom in (4, 0.25)


@pytest.mark.parametrize(
    ("tiles", "asked"),
    [
        (_tiles(0.01, 16_384, 10_000, 64), {"object_size_px": 64.0}),
        (_tiles(8.0, 3000, 7, 2), {"um_per_px": 0.3}),
    ],
)
def test_tiles_of_a_request_may_exceed_the_bounds_of_a_configuration(
    tiles: dict[str, Any], asked: dict[str, Any]
) -> None:
    config = _config(tiles)
    resize = fit_scale(config, **asked).input.resize
    usual = config.input.resize
    assert isinstance(resize, TileResize) and isinstance(usual, TileResize)
    assert resize.canvas_hw == usual.canvas_hw
    assert resize.tile_hw != usual.tile_hw
