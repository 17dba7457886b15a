from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.canvases import Bucket, cover_canvases, find_bucket, list_canvases
from pipeline.model_config import InputSpec, KeepRatioResize, TileResize
from pipeline.preprocess import keep_ratio_size, prepare

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
