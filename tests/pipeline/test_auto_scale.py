"""The scale of an image from the objects in some of its tiles."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pipeline.auto_scale import (
    LEAST_OBJECTS,
    PROBES,
    UNCERTAIN,
    Sighting,
    choose_scale,
    count_probes,
    probe_image,
)
from pipeline.model_config import ModelConfig
from pipeline.types import Candidates, UInt8
from tests.support.blob_model import build_graph, model_config

OWN_PX = 16.0


def _config(**changes: Any) -> ModelConfig:
    content = model_config(build_graph())
    (entry,) = content.pop("versions").values()
    content.pop("schema_version")
    card = {"object_size_px": OWN_PX}
    return ModelConfig.model_validate({**content, **entry, "version": 1, "card": card, **changes})


CONFIG = _config()


def _sightings(*sizes: float, zoom: float = 1.0) -> list[Sighting]:
    return [Sighting(zoom, size, 0.8) for size in sizes]


def _noise(height: int, width: int) -> UInt8:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("size_px", "zoom"),
    [(16, 1), (31, 1), (43, 1), (48, 1 / 3), (9, 1), (6.4, 2.5), (2, 4), (99, 0.25)],
)
def test_objects_get_the_size_that_the_model_expects(size_px: float, zoom: float) -> None:
    choice = choose_scale(CONFIG, _sightings(*[size_px] * 5, zoom=2.0))
    assert choice.zoom == pytest.approx(zoom) and choice.warnings == ()


def test_tiles_in_which_the_objects_have_the_models_size_count_most() -> None:
    """Small objects at the model's own scale are often several, found as one."""
    merged = _sightings(*[20.0] * 20, zoom=0.5)
    right = _sightings(*[6.4] * 10, zoom=2.0)
    assert choose_scale(CONFIG, merged + right).zoom == pytest.approx(2.5)


def test_small_objects_that_are_less_certain_when_enlarged_change_nothing() -> None:
    small = [Sighting(2.0, 7.0, 0.5)] * 20
    choice = choose_scale(CONFIG, [*small, *[Sighting(1.0, 7.0, 0.7)] * 5])
    assert (choice.zoom, [w.code for w in choice.warnings]) == (1, [UNCERTAIN])
    choice = choose_scale(CONFIG, [*small, *[Sighting(1.0, 7.0, 0.4)] * 5])
    assert choice.zoom == pytest.approx(16 / 7) and choice.warnings == ()


@pytest.mark.parametrize("count", range(LEAST_OBJECTS))
def test_few_objects_change_nothing_and_say_so(count: int) -> None:
    choice = choose_scale(CONFIG, _sightings(*[50.0] * count))
    (warning,) = choice.warnings
    assert (choice.zoom, warning.code) == (1, UNCERTAIN)
    assert warning.message.startswith(f"{count} objects are too few")


def test_objects_of_many_sizes_are_a_warning() -> None:
    choice = choose_scale(CONFIG, _sightings(*[8.0] * 10, *[30.0] * 10))
    assert [w.code for w in choice.warnings] == [UNCERTAIN]
    assert "objects of 8 to 30 px" in choice.warnings[0].message


def test_the_order_does_not_matter() -> None:
    sizes = list(np.random.default_rng(1).uniform(5, 60, 30))
    choices = {choose_scale(CONFIG, _sightings(*order)) for order in (sizes, sizes[::-1])}
    assert len(choices) == 1


@pytest.mark.parametrize(
    "hw", [(1, 1), (10, 500), (64, 64), (65, 64), (129, 300), (400, 31), (700, 900)]
)
def test_as_many_tiles_as_were_counted_all_of_one_shape(hw: tuple[int, int]) -> None:
    probe = probe_image(_noise(*hw), CONFIG.input)
    assert len(probe.prepared.tiles) == count_probes(hw, CONFIG.input) == len(probe.zooms)
    assert len(probe.prepared.tiles) <= sum(PROBES.values())
    assert {tile.image.shape for tile in probe.prepared.tiles} == {(128, 128, 3)}
    for tile, zoom in zip(probe.prepared.tiles, probe.zooms, strict=True):
        shown = tile.valid_hw[0] / tile.window.height, tile.valid_hw[1] / tile.window.width
        if min(hw) > 30:
            assert shown == pytest.approx((2 * zoom, 2 * zoom), rel=0.1)


def test_the_tiles_are_where_the_structure_is() -> None:
    image = np.zeros((640, 640, 3), np.uint8)
    image[420:560, 90:230] = _noise(140, 140)
    for tile in probe_image(image, CONFIG.input).prepared.tiles:
        window = tile.window
        assert image[window.y : window.y + window.height, window.x : window.x + window.width].any()


def test_objects_that_the_border_of_a_tile_cuts_are_left_out() -> None:
    probe = probe_image(_noise(300, 300), CONFIG.input)
    index = probe.zooms.index(1.0)
    tile = probe.prepared.tiles[index]
    assert None not in tile.shared or tile.window.y + tile.window.x > 0
    masks = np.zeros((2, 32, 32), np.float32)
    masks[0, 12:20, 12:20] = 1  # 16 px
    masks[1, 12:20] = 1  # from the left to the right border
    candidates = Candidates(np.array([0.9, 0.8], np.float32), np.array([0, 1]), masks)
    (found,) = probe.find(index, candidates, CONFIG)
    assert found.zoom == 1 and found.score == pytest.approx(0.9)
    assert found.diameter_px == pytest.approx(math.sqrt(4 * 16 * 16 / math.pi), rel=0.1)
