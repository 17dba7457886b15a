"""Masks in images of more than 2^32 pixels: as in a small part of them, moved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from pipeline.encode import decode_box, decode_window
from pipeline.long_runs import find_columns, share_columns
from pipeline.merge import TileInstance, merge_tiles
from pipeline.merge_stream import StreamMerger, StreamResolver
from pipeline.overlaps import resolve_overlaps
from pipeline.runs import (
    MAX_MASK_PIXELS,
    BoxMask,
    build_instance,
    is_long,
    read_counts,
    write_counts,
)
from pipeline.types import Detection, Window

SMALL, LARGE = (300, 400), (120_000, 100_000)
AT = 119_700, 99_600
"""Where the small image is in the large one: its end, so that masks reach the last pixel."""


def draw(hw: tuple[int, int], at: tuple[int, int], seed: int, count: int = 30) -> list[Detection]:
    """Blobs in an area of the size `SMALL`, whose corner is at y, x of the image."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        height, width = rng.integers(3, 60, 2)
        y, x = rng.integers(0, np.array(SMALL) - (height, width) + 1)
        if rng.random() < 0.3:
            y, x = SMALL[0] - height, SMALL[1] - width
        pixels = rng.random((height, width)) < 0.7
        pixels[0, 0] = pixels[-1, -1] = True
        mask = BoxMask(at[0] + int(y), at[1] + int(x), pixels)
        found.append(build_instance(mask, hw, 0, float(rng.random())))
    return found


def move(instance: Detection) -> tuple[Any, ...]:
    """An instance of the large image, as it is in the small one."""
    x, y, width, height = instance.bbox_xywh
    pixels = decode_box(instance)
    assert pixels.sum() == instance.area
    return (x - AT[1], y - AT[0], width, height), pixels.tobytes(), instance.area, instance.score


def show(instance: Detection) -> tuple[Any, ...]:
    return instance.bbox_xywh, decode_box(instance).tobytes(), instance.area, instance.score


def cut(instances: list[Detection], at: tuple[int, int]) -> list[TileInstance]:
    """The instances as two tiles side by side would have found them."""
    windows = [Window(at[0], at[1], 300, 250), Window(at[0], at[1] + 150, 300, 250)]
    entries = []
    for number, instance in enumerate(instances):
        for window in windows:
            x, y, width, height = instance.bbox_xywh
            left, right = max(x, window.x), min(x + width, window.x + window.width)
            if left >= right:
                continue
            pixels = decode_window(instance, Window(y, left, height, right - left)) > 0
            if pixels.any():
                mask = BoxMask(y, left, pixels)
                hw = instance.rle["size"][0], instance.rle["size"][1]
                part = build_instance(mask, hw, instance.label, instance.score)
                entries.append(TileInstance(part, window, right - left < width, number=number))
    return entries


@pytest.mark.parametrize("seed", range(20))
def test_text_is_that_of_pycocotools(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 10 ** rng.integers(1, 7), rng.integers(1, 40))
    counts[0] *= rng.integers(0, 2)
    pixels = int(counts.sum())
    (rle,) = coco_mask.frPyObjects([{"size": [1, pixels], "counts": counts.tolist()}], 1, pixels)
    assert write_counts(counts) == rle["counts"]
    np.testing.assert_array_equal(read_counts(rle["counts"], pixels), counts)


@pytest.mark.parametrize(
    "counts",
    [[MAX_MASK_PIXELS - 9, 1, 8], [1, MAX_MASK_PIXELS, 1], [0, 1], [2**32, 5, 2**33, 7, 1], [5]],
)
def test_long_runs_are_read_as_they_were_written(counts: list[int]) -> None:
    text = write_counts(np.array(counts))
    np.testing.assert_array_equal(read_counts(text, sum(counts)), counts)


def test_a_number_has_40_bits_at_most() -> None:
    with pytest.raises(ValueError, match="number too large"):
        read_counts(write_counts(np.array([2**45])), 2**45)


def test_masks_of_a_large_image_are_those_of_a_small_one() -> None:
    assert is_long(*LARGE) and not is_long(*SMALL)
    small, large = draw(SMALL, (0, 0), 1), draw(LARGE, AT, 1)
    assert [show(i) for i in small] == [move(i) for i in large]
    columns = find_columns(large)
    for instance in large:
        local = columns.enter(instance)
        assert int(coco_mask.area(local)) == instance.area
        assert columns.leave(local) == instance.rle
    (rles,) = share_columns(small)
    assert rles == [instance.rle for instance in small]
    assert share_columns([], []) == [[], []]


@pytest.mark.parametrize("compare", ["masks", "enclosed"])
@pytest.mark.parametrize("seed", range(5))
def test_tiles_are_merged_alike(compare: Any, seed: int) -> None:
    small = merge_tiles(cut(draw(SMALL, (0, 0), seed), (0, 0)), compare=compare)
    large = merge_tiles(cut(draw(LARGE, AT, seed), AT), compare=compare)
    assert len(small) > 0 and [show(i) for i in small] == [move(i) for i in large]


@pytest.mark.parametrize("overlaps", ["keep", "resolve"])
def test_streams_are_merged_alike(overlaps: Any) -> None:
    results = []
    for hw, at in ((SMALL, (0, 0)), (LARGE, AT)):
        merger, resolver = StreamMerger("masks"), StreamResolver(overlaps)
        found = cut(draw(hw, at, 3), at)
        found += [
            replace(entry, window=replace(entry.window, y=entry.window.y + 1)) for entry in found
        ]
        complete = resolver.add(merger.add(found, None), None)
        results.append(sorted(map(show if hw == SMALL else move, complete)))
    assert results[0] and results[0] == results[1]


def test_overlaps_are_resolved_alike() -> None:
    small = resolve_overlaps(draw(SMALL, (0, 0), 2))
    large = resolve_overlaps(draw(LARGE, AT, 2))
    assert 0 < len(small) < 30 and [show(i) for i in small] == [move(i) for i in large]
