"""From candidates to instances: selection, thresholds, tiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from pipeline.model_config import (
    InputSpec,
    MaskNms,
    MatrixNms,
    PostprocessSpec,
    TileResize,
)
from pipeline.postprocess import Collector, Overlaps, postprocess, select
from pipeline.preprocess import prepare
from pipeline.types import Candidates, Prepared, Tile, Window
from tests.support.kernel_cases import draw_masks

MATRIX = PostprocessSpec(nms=MatrixNms(), score_threshold=0.1)
MASK = PostprocessSpec(nms=MaskNms(iou_threshold=0.5), score_threshold=0.1)


def _candidates(masks: list[np.ndarray], scores: list[float], labels: list[int]) -> Candidates:
    shape = masks[0].shape if masks else (8, 8)
    probs = np.stack(masks) if masks else np.zeros((0, *shape))
    return Candidates(
        np.array(scores, np.float32), np.array(labels, np.int64), probs.astype(np.float32)
    )


def _square(y: int, x: int, side: int, size: int = 16) -> np.ndarray:
    mask = np.zeros((size, size))
    mask[y : y + side, x : x + side] = 1
    return mask


def _whole(side: int = 64) -> Prepared:
    tile = Tile(np.zeros((side, side, 3), np.uint8), (side, side), Window(0, 0, side, side))
    return Prepared((side, side), (tile,))


@pytest.mark.parametrize("spec", [MATRIX, MASK])
def test_a_duplicate_goes_and_another_class_stays(spec: PostprocessSpec) -> None:
    masks = [_square(2, 2, 6), _square(2, 2, 6), _square(2, 2, 6), _square(10, 10, 4)]
    found = postprocess(
        _whole(), [_candidates(masks, [0.9, 0.8, 0.7, 0.6], [0, 0, 1, 0])], spec
    ).instances
    kept = [(i.label, round(i.score, 3)) for i in found if i.score > 0.2]
    assert kept == [(0, 0.9), (1, 0.7), (0, 0.6)]
    assert found[0].bbox_xywh == (8, 8, 24, 24)
    assert found[0].area == 24 * 24 - 4  # bilinear enlarging rounds the corners


def test_empty_slots_and_empty_masks_are_dropped() -> None:
    masks = [_square(2, 2, 6), np.zeros((16, 16)), _square(9, 9, 3)]
    found = postprocess(
        _whole(), [_candidates(masks, [0.9, 0.8, 0.0], [0, 0, 0])], MATRIX
    ).instances
    assert [i.score for i in found] == [pytest.approx(0.9)]


@pytest.mark.parametrize("overlaps", ["keep", "resolve"])
def test_no_candidates(overlaps: Overlaps) -> None:
    found = postprocess(_whole(32), [_candidates([], [], [])], MATRIX, overlaps=overlaps).instances
    assert found == []


def test_thresholds_and_bound() -> None:
    masks = [_square(0, 4 * k, 3) for k in range(4)]
    candidates = [_candidates(masks, [0.9, 0.7, 0.5, 0.3], [0] * 4)]
    assert len(postprocess(_whole(), candidates, MASK, score_threshold=0.6).instances) == 2
    assert len(postprocess(_whole(), candidates, MASK, max_instances=3).instances) == 3
    assert len(postprocess(_whole(), candidates, MASK, score_threshold=1.0).instances) == 0


def test_full_k_of_separate_masks_all_stay() -> None:
    masks = [_square(y, x, 1, 20) for y in range(20) for x in range(20)]
    candidates = [_candidates(masks, [0.5] * 400, [0] * 400)]
    assert len(postprocess(_whole(80), candidates, MATRIX, max_instances=500).instances) == 400


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [({"score_threshold": 1.5}, "1.5"), ({"max_instances": 0}, "max_instances 0")],
)
def test_bounds_out_of_range_are_named(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        postprocess(_whole(), [_candidates([_square(0, 0, 2)], [0.5], [0])], MATRIX, **kwargs)


def test_missing_tile_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 candidate sets for 1 tiles"):
        postprocess(_whole(), [], MATRIX)


def test_masks_that_do_not_divide_the_canvas_are_an_error() -> None:
    with pytest.raises(ValueError, match="do not divide the canvas"):
        postprocess(_whole(), [_candidates([np.ones((15, 16))], [0.5], [0])], MATRIX)


def _disc_scene() -> tuple[np.ndarray, list[np.ndarray]]:
    """Discs across, near and far from the tile borders of a 120 x 150 image."""
    rows, columns = np.mgrid[:120, :150]
    centres = [(30, 30), (60, 60), (60, 64 + 24), (20, 120), (100, 75), (100, 20), (62, 130)]
    return rows, [(rows - y) ** 2 + (columns - x) ** 2 <= 8**2 for y, x in centres]


def test_discs_over_tile_borders_are_found_once_with_exact_pixels() -> None:
    rows, discs = _disc_scene()
    spec = InputSpec(resize=TileResize(scale=1.0, tile_hw=(64, 64), overlap_px=24))
    prepared = prepare(np.zeros((*rows.shape, 3), np.uint8), spec)
    assert len(prepared.tiles) > 4
    sets = []
    for number, tile in enumerate(prepared.tiles):
        w = tile.window
        parts = [d[w.y : w.y + w.height, w.x : w.x + w.width] for d in discs]
        seen = [np.where(p, 0.9, 0.1) for p in parts if p.any()]
        # The more pixels are cut off, the surer the fake network is: the hard case.
        scores = [0.9 - 0.01 * number - 0.3 * (p > 0.5).mean() for p in seen]
        order = np.argsort(scores)[::-1]
        sets.append(
            _candidates([seen[i] for i in order], [scores[i] for i in order], [0] * len(order))
            if seen
            else Candidates(
                np.zeros(0, np.float32), np.zeros(0, np.int64), np.zeros((0, 64, 64), np.float32)
            )
        )
    found = postprocess(prepared, sets, MASK).instances
    assert len(found) == len(discs)
    got = {bytes(coco_mask.decode(i.rle)) for i in found}
    assert got == {bytes(d.astype(np.uint8)) for d in discs}
    assert [i.score for i in found] == sorted((i.score for i in found), reverse=True)


BORDERS = InputSpec(resize=TileResize(scale=1.0, tile_hw=(64, 64), overlap_px=24))


def _ellipses(rng: np.random.Generator, image_hw: tuple[int, int], count: int) -> list[np.ndarray]:
    """Masks of ellipses, 4 to 20 px across, that keep 2 px apart."""
    rows, columns = np.mgrid[: image_hw[0], : image_hw[1]]
    free = np.ones(image_hw, np.bool_)
    masks: list[np.ndarray] = []
    while len(masks) < count:
        y, x = rng.uniform(0, image_hw[0]), rng.uniform(0, image_hw[1])
        a, b = rng.uniform(2, 10, 2)
        radius = np.hypot((rows - y) / a, (columns - x) / b)
        if (radius <= 1).any() and free[radius <= 1].all():
            masks.append(radius <= 1)
            free &= (abs(rows - y) > a + 2) | (abs(columns - x) > b + 2)
    return masks


def _answer(masks: list[np.ndarray], scores: list[float], tile: Tile) -> Candidates:
    """What a network that sees masks of the image answers for a tile."""
    w = tile.window
    inside = [m[w.y : w.y + w.height, w.x : w.x + w.width] for m in masks]
    seen = [i for i in np.argsort(scores)[::-1] if inside[i].any()]
    probs = np.zeros((len(seen), w.height, w.width))
    for slot, i in enumerate(seen):
        probs[slot] = inside[i]
    return _candidates([*probs], [scores[i] for i in seen], [0] * len(seen)) if seen else _NOTHING


_NOTHING = Candidates(
    np.zeros(0, np.float32), np.zeros(0, np.int64), np.zeros((0, 64, 64), np.float32)
)


@pytest.mark.parametrize("seed", range(4))
def test_a_mosaic_has_each_ellipse_once_and_no_straight_edges(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = _ellipses(rng, (150, 170), 60)
    prepared = prepare(np.zeros((150, 170, 3), np.uint8), BORDERS)
    sets = []
    for tile in prepared.tiles:
        masks, scores = list(truth), [*rng.uniform(0.3, 0.8, len(truth))]
        window = tile.window
        for side, shared in enumerate(tile.shared):
            if shared is None:
                continue
            # Half a disc at the border that only this tile finds, surer than of anything else.
            along = int(rng.integers(20, 45))
            y, x = ((0, along), (along, 0), (63, along), (along, 63))[side]
            rows, columns = np.mgrid[:150, :170]
            half = np.hypot(rows - window.y - y, columns - window.x - x) <= 9
            tiled = np.zeros((150, 170), np.bool_)
            tiled[window.y : window.y + 64, window.x : window.x + 64] = True
            masks.append(half & tiled)
            scores.append(0.95)
        sets.append(_answer(masks, scores, tile))
    found = postprocess(prepared, sets, MASK).instances
    assert {coco_mask.decode(i.rle).tobytes("C") for i in found} == {
        m.astype(np.uint8).tobytes() for m in truth
    }
    assert len(found) == len(truth)
    for most in (1, 2, 5, len(truth) - 1):
        assert postprocess(prepared, sets, MASK, max_instances=most).instances == found[:most]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("length", [12, 22, 23, 24, 25, 26, 27])
def test_an_object_as_long_as_the_overlap_is_not_lost_between_tiles(axis: int, length: int) -> None:
    """Each tile misses the end of the object that is farther inside the tile."""
    shape = (104, 64) if axis == 0 else (64, 104)
    prepared = prepare(np.zeros((*shape, 3), np.uint8), BORDERS)
    assert len(prepared.tiles) == 2
    for start in range(30, 60):
        masks = []
        for a, b in ((start + 1, start + length), (start, start + length - 1)):
            mask = np.zeros((104, 64), np.bool_)
            mask[a:b, 20:30] = True
            masks.append(mask if axis == 0 else mask.T)
        answers = [_answer([m], [0.9], t) for m, t in zip(masks, prepared.tiles, strict=True)]
        (instance,) = postprocess(prepared, answers, MASK).instances
        assert instance.area >= 10 * (length - 2)


@pytest.mark.parametrize("spec", [MATRIX, MASK, MATRIX.model_copy(update={"compare": "enclosed"})])
@pytest.mark.parametrize("count", [0, 1, 40, 400])
def test_leaving_out_candidates_below_the_least_score_changes_no_other(
    spec: PostprocessSpec, count: int
) -> None:
    rng = np.random.default_rng(count)
    masks = draw_masks(rng, max(count, 1), (20, 26))[:count]
    masks[count // 2 :] = masks[: count - count // 2]  # duplicates, and they decay
    scores = -np.sort(-rng.random(count).astype(np.float32))
    candidates = Candidates(scores, rng.integers(0, 2, count), masks)
    all_scores, all_indices = select(candidates, spec)
    for least_score in (0.0, 0.3, 0.7, 1.0):
        kept_scores, kept_indices = select(candidates, spec, least_score=least_score)
        stays = all_scores >= least_score
        np.testing.assert_array_equal(kept_scores, all_scores[stays])
        np.testing.assert_array_equal(kept_indices, all_indices[stays])


@pytest.mark.parametrize("bound", [1, 2, 3, 4])
def test_masks_that_are_dropped_for_overlaps_make_room_for_others(bound: int) -> None:
    """The best instances of an image do not depend on how many are asked for."""
    masks = [_square(0, 0, 8), _square(0, 1, 7), _square(1, 0, 7), _square(10, 10, 4)]
    candidates = _candidates(masks, [0.9, 0.8, 0.7, 0.6], [0, 1, 2, 3])
    prepared = _whole()
    collector = Collector((64, 64), 1, MASK, max_instances=bound, overlaps="resolve")
    collector.add(0, collector.search(prepared.tiles[0], candidates))
    found = collector.merge()
    assert [i.label for i in found.instances] == [0, 3][:bound]
    assert found.found == 2


def test_confidence_is_that_of_the_surest_tile_and_independent_of_the_bounds() -> None:
    scores = [[0.9, 0.8, 0.2], [0.7, 0.7, 0.7, 0.7, 0.6, 0.6, 0.5]]
    sets = [_candidates([_square(0, 0, 4)] * len(s), s, [0] * len(s)) for s in scores]
    prepared = Prepared((64, 64), (*_whole().tiles, *_whole().tiles))
    found = postprocess(prepared, sets, MASK, score_threshold=0.75, max_instances=1)
    assert found.confidence == pytest.approx((0.7 * 4 + 0.6) / 5)
    low = _candidates([_square(0, 0, 4)] * 2, [0.5, MASK.update_threshold / 2], [0, 0])
    assert postprocess(_whole(), [low], MASK).confidence == pytest.approx(0.1)
    assert postprocess(_whole(), [_candidates([], [], [])], MASK).confidence == 0
