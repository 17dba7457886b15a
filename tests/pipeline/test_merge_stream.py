from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.merge import Ranked, TileInstance, find_groups, merge_tiles
from pipeline.merge_stream import StreamMerger, StreamResolver
from pipeline.overlaps import resolve_overlaps
from pipeline.preprocess import tile_starts
from pipeline.runs import BoxMask, encode_box_mask
from pipeline.types import Detection, Window

HW = (300, 220)
TILE, OVERLAP = 64, 24


def _disc(y: int, x: int, radius: int, window: Window) -> BoxMask | None:
    rows, columns = np.mgrid[y - radius : y + radius + 1, x - radius : x + radius + 1]
    inside = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    inside &= (rows >= window.y) & (rows < window.y + window.height)
    inside &= (columns >= window.x) & (columns < window.x + window.width)
    found = np.argwhere(inside)
    if not len(found):
        return None
    (top, left), (bottom, right) = found.min(axis=0), found.max(axis=0)
    part = inside[top : bottom + 1, left : right + 1]
    return BoxMask(int(y - radius + top), int(x - radius + left), part)


def _scatter(rng: np.random.Generator, discs: int) -> dict[int, list[TileInstance]]:
    """Discs as every tile shows them, by the first row of the tile."""
    rows, columns = (tile_starts(side, TILE, OVERLAP) for side in HW)
    windows = [Window(y, x, TILE, TILE) for y in rows for x in columns]
    found: dict[int, list[TileInstance]] = {y: [] for y in rows}
    shapes = [
        (int(rng.integers(2, HW[0] - 2)), int(rng.integers(2, HW[1] - 2)), int(rng.integers(2, 40)))
        for _ in range(discs)
    ]
    for window in windows:
        for y, x, radius in shapes:
            box = _disc(y, x, radius + int(rng.integers(0, 2)), Window(0, 0, *HW))
            seen = _disc(y, x, radius, window)
            if box is None or seen is None or rng.random() < 0.1:
                continue
            height, width = seen.pixels.shape
            rle = encode_box_mask(seen, HW)
            instance = Detection(
                int(rng.integers(0, 2)) if rng.random() < 0.05 else 0,
                float(rng.random()),
                rle,
                (seen.x, seen.y, width, height),
                int(seen.pixels.sum()),
            )
            is_cut = seen.pixels.size < box.pixels.size
            others = [
                other
                for other in windows
                if other != window
                and other.y < box.y
                and box.y + box.pixels.shape[0] < other.y + TILE
                and other.x < box.x
                and box.x + box.pixels.shape[1] < other.x + TILE
            ]
            elsewhere = others[0] if is_cut and others else None
            number = sum(entry.window == window for entry in found[window.y])
            entry = TileInstance(instance, window, is_cut, elsewhere, number)
            found[window.y].append(entry)
    return found


def _keys(instances: list[Detection]) -> list[tuple[bytes, float, int, int]]:
    return sorted((i.rle["counts"], i.score, i.label, i.area) for i in instances)


@pytest.mark.parametrize("seed", range(12))
def test_rows_that_come_one_by_one_give_what_all_tiles_give(seed: int) -> None:
    found = _scatter(np.random.default_rng(seed), 4 + 3 * seed)
    everything = [entry for entries in found.values() for entry in entries]
    assert len(everything) > 4
    merger, rows, merged = StreamMerger(), list(found), []
    for number, y in enumerate(rows):
        next_y = rows[number + 1] if number + 1 < len(rows) else None
        merged += merger.add(found[y], next_y)
        merger = StreamMerger(waiting=merger.waiting)  # as after an interruption
    assert not merger.waiting
    assert _keys([entry.instance for entry in merged]) == _keys(merge_tiles(everything))
    merged.sort(key=lambda entry: entry.rank)
    assert [entry.instance for entry in merged] == merge_tiles(everything)


@pytest.mark.parametrize("scores", [1000, 3])
@pytest.mark.parametrize("seed", range(3, 9))
def test_overlaps_are_resolved_row_by_row_as_in_the_whole(seed: int, scores: int) -> None:
    """Equal scores, too, as networks give them to what they are sure of."""
    found = {
        y: [
            replace(
                e, instance=replace(e.instance, score=round(e.instance.score * scores) / scores)
            )
            for e in entries
        ]
        for y, entries in _scatter(np.random.default_rng(seed), 6 + 4 * seed).items()
    }
    merger, resolver, rows, resolved = StreamMerger(), StreamResolver("resolve"), list(found), []
    waited = 0
    for number, y in enumerate(rows):
        next_y = rows[number + 1] if number + 1 < len(rows) else None
        merged = merger.add(found[y], next_y)
        resolved += resolver.add(merged, merger.first_open(next_y))
        waited += len(resolver.waiting)
        merger = StreamMerger(waiting=merger.waiting)  # as after an interruption
        resolver = StreamResolver("resolve", resolver.waiting)
    assert waited and not resolver.waiting
    everything = [entry for entries in found.values() for entry in entries]
    whole = merge_tiles(everything)
    assert resolve_overlaps(whole) != whole
    assert _keys(resolved) == _keys(resolve_overlaps(whole))


def test_an_instance_waits_for_those_that_it_overlaps() -> None:
    found = [
        Detection(label, 0.5, encode_box_mask(BoxMask(y, x, np.ones((10, 10), np.bool_)), HW),
                  (x, y, 10, 10), 100)
        for label, (y, x) in enumerate([(0, 0), (5, 9), (14, 18), (14, 100)])
    ]  # fmt: skip
    entries = [Ranked((-1.0, False, -1.0, 0, 0, n), i) for n, i in enumerate(found)]
    for open_y, waiting in ((9, 4), (15, 4), (23, 4), (24, 0)):
        resolver = StreamResolver("resolve")
        done = resolver.add(entries, open_y)
        assert (len(resolver.waiting), len(done)) == (waiting, 4 - waiting)
    resolver = StreamResolver("resolve")
    assert [i.label for i in resolver.add([entries[0], entries[3]], 20)] == [0]
    assert resolver.add([], None) == [found[3]]


def test_only_what_reaches_the_next_row_waits() -> None:
    window = Window(0, 0, TILE, TILE)
    for height, waits in ((40, False), (41, True)):
        mask = np.ones((height, 3), np.bool_)
        rle = encode_box_mask(BoxMask(0, 0, mask), HW)
        instance = Detection(0, 0.5, rle, (0, 0, 3, height), int(mask.sum()))
        merger = StreamMerger()
        complete = merger.add([TileInstance(instance, window, False)], next_y=40)
        assert (len(complete), len(merger.waiting)) == ((0, 1) if waits else (1, 0))


def test_groups_are_connected_by_shared_pixels() -> None:
    found = _scatter(np.random.default_rng(1), 6)
    everything = [entry for entries in found.values() for entry in entries]
    groups = find_groups(everything)
    assert find_groups([]) == [] and 1 < len(set(groups)) < len(everything)
    assert all(groups[group] == group for group in groups)
