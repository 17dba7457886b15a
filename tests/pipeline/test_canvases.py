from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.canvases import (
    Bucket,
    choose_canvases,
    cover_canvases,
    find_bucket,
    find_padding,
    find_recorded,
    list_canvases,
)
from pipeline.model_config import InputSpec, KeepRatioResize, TileResize
from pipeline.preprocess import keep_ratio_size, prepare, round_canvas
from tests.service.engines.test_ort_session import read_config

SOLO = KeepRatioResize(short_side=800, long_side=1333)
SOLO_512 = KeepRatioResize(short_side=512, long_side=852)
RULES = (
    SOLO,
    SOLO_512,
    KeepRatioResize(short_side=64, long_side=64),
    KeepRatioResize(short_side=96, long_side=64),  # the long side is always the limit
    KeepRatioResize(short_side=48, long_side=64, pad_multiple=1),
    KeepRatioResize(short_side=50, long_side=333, pad_multiple=64),
)


def canvas_of(image_hw: tuple[int, int], rule: KeepRatioResize) -> tuple[int, int]:
    """The size rule of `prepare`, without an image."""
    height, width = keep_ratio_size(image_hw, rule.short_side, rule.long_side)
    multiple = rule.pad_multiple
    return math.ceil(height / multiple) * multiple, math.ceil(width / multiple) * multiple


def random_sizes(count: int, seed: int) -> list[tuple[int, int]]:
    """Log-uniform image sizes, from one pixel to more than the server accepts."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(0, np.log(20_000), (count, 2))).astype(int)
    return [(int(h), int(w)) for h, w in sizes]


@pytest.mark.parametrize("rule", RULES)
def test_no_image_falls_outside(rule: KeepRatioResize) -> None:
    canvases = set(list_canvases(InputSpec(resize=rule)))
    buckets = cover_canvases(canvases)
    for image_hw in random_sizes(3_000, seed=3):
        canvas = canvas_of(image_hw, rule)
        assert canvas in canvases, image_hw
        assert buckets[find_bucket(buckets, canvas)].holds(canvas)


@pytest.mark.parametrize("rule", RULES)
def test_every_listed_canvas_occurs(rule: KeepRatioResize) -> None:
    """Images of exactly the resized sizes, in both orientations, produce every canvas."""
    longest = rule.long_side
    images = {(short, longest) for short in range(1, longest + 1)}
    images |= {(rule.short_side, long) for long in range(rule.short_side, longest + 1)}
    found = {canvas_of(hw, rule) for hw in images | {(w, h) for h, w in images}}
    assert found == set(list_canvases(InputSpec(resize=rule)))


@pytest.mark.parametrize("image_hw", [(1, 1), (1, 50), (64, 48), (480, 640), (300, 30)])
def test_prepare_gives_a_listed_canvas(image_hw: tuple[int, int]) -> None:
    spec = InputSpec(resize=KeepRatioResize(short_side=64, long_side=128))
    (tile,) = prepare(np.zeros((*image_hw, 3), np.uint8), spec).tiles
    assert tile.image.shape[:2] in list_canvases(spec)


def test_tiles_have_one_canvas_and_one_bucket() -> None:
    spec = InputSpec(resize=TileResize(scale=2.0, tile_hw=(144, 96), overlap_px=16))
    assert list_canvases(spec) == ((288, 192),)
    assert cover_canvases(list_canvases(spec)) == (Bucket((288, 192), (288, 192), (288, 192)),)


@settings(deadline=None, max_examples=40)
@given(
    canvases=st.sets(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1),
    max_buckets=st.integers(2, 10),
)
def test_buckets_cover_any_set(canvases: set[tuple[int, int]], max_buckets: int) -> None:
    buckets = cover_canvases(canvases, max_buckets)
    assert len(buckets) <= max_buckets
    for canvas in canvases:
        assert buckets[find_bucket(buckets, canvas)].holds(canvas)
    for bucket in buckets:
        assert bucket.opt_hw in canvases
        assert bucket.holds(bucket.opt_hw)


@pytest.mark.parametrize("rule", [SOLO, SOLO_512])
def test_no_bucket_exceeds_the_largest_canvas(rule: KeepRatioResize) -> None:
    """An engine allocates memory for the largest shape of its buckets."""
    canvases = list_canvases(InputSpec(resize=rule))
    largest = max(height * width for height, width in canvases)
    for bucket in cover_canvases(canvases):
        assert bucket.max_hw[0] * bucket.max_hw[1] <= largest


def test_impossible_covers_are_rejected() -> None:
    with pytest.raises(ValueError, match="1 buckets cannot cover 2"):
        cover_canvases({(2, 3), (3, 2)}, 1)
    with pytest.raises(ValueError, match="cover 0 canvases"):
        cover_canvases(set())
    with pytest.raises(ValueError, match=r"no bucket contains the canvas \(9, 9\)"):
        find_bucket(cover_canvases({(2, 3), (3, 2)}), (9, 9))


@pytest.mark.parametrize(
    ("short", "long", "expected"),
    [
        (800, 1333, {(800, 800), (800, 1088), (800, 1216), (800, 1344)}),
        (512, 853, {(512, 512), (512, 704), (512, 768), (512, 864)}),
        (512, 512, {(512, 512), (384, 512), (352, 512)}),
        (853, 512, {(512, 512), (384, 512), (352, 512)}),
        (1, 1, {(32, 32)}),
        (32, 4096, {(32, 32), (32, 64), (32, 4096)}),
    ],
)
def test_the_chosen_canvases_are_few_and_hold_every_image(
    short: int, long: int, expected: set[tuple[int, int]]
) -> None:
    spec = InputSpec(resize=KeepRatioResize(short_side=short, long_side=long))
    chosen = choose_canvases(spec)
    assert set(chosen) == expected | {(width, height) for height, width in expected}
    assert len(chosen) <= 7 and list(chosen) == sorted(set(chosen))
    every = list_canvases(spec)
    assert set(chosen) <= set(every), "no canvas that no image has"
    for canvas in every:
        held = round_canvas(canvas, chosen)
        assert held in chosen and held[0] >= canvas[0] and held[1] >= canvas[1]


@pytest.mark.parametrize("hw", [(480, 640), (427, 640), (640, 640), (960, 1280), (3000, 2000)])
def test_images_of_usual_ratios_keep_their_canvas(hw: tuple[int, int]) -> None:
    spec = InputSpec(resize=KeepRatioResize(short_side=800, long_side=1333))
    image = np.zeros((*hw, 3), np.uint8)
    exact, padded = (prepare(image, spec, canvases=c).tiles[0] for c in ((), choose_canvases(spec)))
    assert exact.image.shape == padded.image.shape


def test_a_canvas_is_padded_to_the_smallest_that_holds_it() -> None:
    chosen = [(32, 96), (96, 32), (64, 64), (96, 96)]
    assert round_canvas((32, 64), chosen) == (32, 96)
    assert round_canvas((64, 32), chosen) == (96, 32)
    assert round_canvas((64, 64), chosen) == (64, 64)
    assert round_canvas((33, 33), chosen) == (64, 64)
    assert round_canvas((65, 1), chosen) == (96, 32)
    with pytest.raises(ValueError, match=r"none of the canvases .* holds \(97, 1\)"):
        round_canvas((97, 1), chosen)


def test_tiles_keep_their_canvas() -> None:
    spec = InputSpec(resize=TileResize(scale=2.0, tile_hw=(48, 64), overlap_px=8))
    assert choose_canvases(spec) == ((96, 128),)
    image = np.zeros((100, 30, 3), np.uint8)
    for canvases in ((), ((96, 128),)):
        assert {t.image.shape for t in prepare(image, spec, canvases=canvases).tiles} == {
            (96, 128, 3)
        }


def test_padding_changes_neither_the_pixels_nor_the_valid_part() -> None:
    spec = InputSpec(resize=KeepRatioResize(short_side=64, long_side=128))
    image = np.random.default_rng(1).integers(1, 256, (50, 70, 3), np.uint8)
    (exact,), (padded,) = (prepare(image, spec, canvases=c).tiles for c in ((), ((128, 128),)))
    assert (exact.image.shape, padded.image.shape) == ((64, 96, 3), (128, 128, 3))
    assert exact.valid_hw == padded.valid_hw and exact.window == padded.window
    height, width = exact.valid_hw
    np.testing.assert_array_equal(exact.image[:height, :width], padded.image[:height, :width])
    assert not padded.image[height:].any() and not padded.image[:, width:].any()


def test_only_gpus_pad_and_one_canvas_needs_no_list() -> None:
    config = read_config(
        input={"resize": {"rule": "keep_ratio", "short_side": 64, "long_side": 96}}
    )
    listed = config.model_copy(update={"canvases": choose_canvases(config.input)})
    assert find_padding(listed, "cpu") == find_padding(config, "cuda") == ()
    assert find_padding(listed, "cuda") == find_recorded(listed) == listed.canvases
    assert find_recorded(config) == ()
    assert find_recorded(read_config()) == ((128, 128),)
