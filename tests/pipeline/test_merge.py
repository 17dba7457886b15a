"""Objects that several tiles see: each comes out once, with its exact pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from pipeline.merge import TileInstance, merge_tiles
from pipeline.preprocess import tile_starts
from pipeline.runs import BoxMask, build_instance
from pipeline.types import Detection, Window

Mask = NDArray[np.bool_]
TILE, OVERLAP = 64, 16


def _disc(y: float, x: float, radius: float, shape: tuple[int, int] = (120, 160)) -> Mask:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return np.asarray((rows - y) ** 2 + (columns - x) ** 2 <= radius**2)


def _instance(mask: Mask, score: float, label: int = 0) -> Detection:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    shape = (mask.shape[0], mask.shape[1])
    return build_instance(BoxMask(int(rows[0]), int(columns[0]), box), shape, label, score)


def _see(mask: Mask, window: Window, score: float = 0.5, label: int = 0) -> list[TileInstance]:
    """What a perfect network finds of an object in one tile."""
    top, left = window.y, window.x
    bottom, right = top + window.height, left + window.width
    inside = np.zeros_like(mask)
    inside[top:bottom, left:right] = mask[top:bottom, left:right]
    if not inside.any():
        return []
    cut = bool(
        (top > 0 and inside[top].any())
        or (left > 0 and inside[:, left].any())
        or (bottom < mask.shape[0] and inside[bottom - 1].any())
        or (right < mask.shape[1] and inside[:, right - 1].any())
    )
    return [TileInstance(_instance(inside, score, label), window, cut)]


def _windows(shape: tuple[int, int]) -> list[Window]:
    return [
        Window(y, x, min(TILE, shape[0]), min(TILE, shape[1]))
        for y in tile_starts(shape[0], TILE, OVERLAP)
        for x in tile_starts(shape[1], TILE, OVERLAP)
    ]


def _pixels(found: Sequence[Detection]) -> list[bytes]:
    return sorted(coco_mask.decode(i.rle).tobytes() for i in found)


def _expected(masks: Sequence[Mask]) -> list[bytes]:
    return sorted(np.asfortranarray(m.astype(np.uint8)).tobytes() for m in masks)


@pytest.mark.parametrize("radius", [0, 1, 5, 12, 25, 50])
@pytest.mark.parametrize("seed", range(8))
def test_a_disc_anywhere_comes_out_once_and_exact(radius: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    disc = _disc(int(rng.integers(0, 120)), int(rng.integers(0, 160)), radius)
    found = [part for w in _windows((120, 160)) for part in _see(disc, w, float(rng.random()))]
    merged = merge_tiles(found)
    assert _pixels(merged) == _expected([disc])
    (instance,) = merged
    assert instance.area == disc.sum()
    assert instance.bbox_xywh == _instance(disc, 0.5).bbox_xywh
    coco = coco_mask.encode(np.asfortranarray(disc.astype(np.uint8)))
    assert instance.rle["counts"] == coco["counts"]


def test_many_touching_discs_stay_apart() -> None:
    discs = [_disc(y, x, 7.4) for y in range(8, 112, 15) for x in range(8, 152, 15)]
    rng = np.random.default_rng(0)
    found = [
        part
        for w in _windows((120, 160))
        for d in discs
        for part in _see(d, w, float(rng.random()))
    ]
    assert _pixels(merge_tiles(found)) == _expected(discs)


def test_a_bar_through_all_tiles_is_joined_with_its_best_score() -> None:
    bar = np.zeros((120, 160), np.bool_)
    bar[58:66, 4:157] = True
    windows = _windows((120, 160))
    parts = [p for n, w in enumerate(windows) for p in _see(bar, w, 0.1 + 0.05 * n)]
    assert len(parts) > 3
    (instance,) = merge_tiles(parts)
    assert _pixels([instance]) == _expected([bar])
    assert instance.score == max(p.instance.score for p in parts)


def test_the_whole_mask_wins_over_a_surer_cut_one() -> None:
    disc = _disc(30, 62, 7)
    windows = [Window(0, 0, 64, 64), Window(0, 48, 64, 64)]
    cut, whole = _see(disc, windows[0], 0.9)[0], _see(disc, windows[1], 0.4)[0]
    assert cut.cut and not whole.cut
    assert merge_tiles([cut, whole]) == [whole.instance]


def test_other_classes_are_left_alone() -> None:
    disc = _disc(30, 62, 7)
    windows = [Window(0, 0, 64, 64), Window(0, 48, 64, 64)]
    found = _see(disc, windows[0], 0.9, label=1) + _see(disc, windows[1], 0.4, label=0)
    assert [i.label for i in merge_tiles(found)] == [1, 0]


def test_masks_of_one_tile_are_left_to_its_own_nms() -> None:
    window = Window(0, 0, 64, 64)
    disc = _disc(30, 30, 7)
    assert len(merge_tiles(_see(disc, window, 0.9) + _see(disc, window, 0.2))) == 2


def test_a_second_cut_mask_of_a_tile_does_not_blur_the_joined_object() -> None:
    disc = _disc(30, 56, 20)
    left, right = Window(0, 0, 64, 64), Window(0, 48, 64, 64)
    worse = _disc(30, 56, 22)
    found = _see(disc, left, 0.9) + _see(disc, right, 0.8) + _see(worse, right, 0.3)
    assert _pixels(merge_tiles(found)) == _expected([disc])


def _leave(part: TileInstance, to: Window) -> TileInstance:
    return replace(part, elsewhere=to)


def test_a_cut_mask_that_another_tile_shows_more_of_goes_whatever_that_tile_found() -> None:
    left, right = Window(0, 0, 64, 64), Window(0, 48, 64, 64)
    cut = _leave(_see(_disc(30, 62, 7), left, 0.9)[0], right)
    assert merge_tiles([cut]) == []
    far = _see(_disc(30, 100, 5), right)
    assert merge_tiles([cut, *far]) == [far[0].instance]


def test_a_mask_that_two_tiles_leave_to_each_other_is_kept_once() -> None:
    left, right = Window(0, 0, 64, 64), Window(0, 48, 64, 64)
    bar = np.zeros((120, 160), np.bool_)
    bar[20:30, 48:64] = True
    shifted = {left: bar.copy(), right: bar.copy()}
    shifted[left][:, :50] = shifted[right][:, 62:] = False
    found = [
        _leave(_see(shifted[left], left, 0.9)[0], right),
        _leave(_see(shifted[right], right, 0.8)[0], left),
    ]
    (instance,) = merge_tiles(found)
    assert _pixels([instance]) == _expected([bar])
    assert merge_tiles(found[:1]) == merge_tiles(found[1:]) == []


def test_masks_left_to_a_third_tile_do_not_hold_each_other() -> None:
    windows = [Window(0, 0, 64, 64), Window(0, 48, 64, 64), Window(48, 48, 64, 64)]
    part = _disc(62, 56, 5)
    part[64:] = False
    found = [_leave(_see(part, w, 0.9)[0], windows[2]) for w in windows[:2]]
    assert merge_tiles(found) == []


def test_disagreeing_cut_masks_stay_two() -> None:
    left, right = Window(0, 0, 64, 64), Window(0, 48, 64, 64)
    found = _see(_disc(15, 56, 12), left, 0.9) + _see(_disc(38, 56, 12), right, 0.8)
    assert len(merge_tiles(found)) == 2


def test_the_best_come_first() -> None:
    window = Window(0, 0, 64, 64)
    found = [p for n in range(5) for p in _see(_disc(30, 6 + 12 * n, 3), window, 0.2 + 0.1 * n)]
    assert [round(i.score, 1) for i in merge_tiles(found)] == [0.6, 0.5, 0.4, 0.3, 0.2]


def test_nothing_to_merge() -> None:
    assert merge_tiles([]) == []
