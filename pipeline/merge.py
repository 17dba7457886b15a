"""Instances of overlapping tiles become the instances of one image.

An object near an inner tile border is seen by two or more tiles: whole by one and cut by another
(whether there is an object, and its mask, are up to the first), or, if it is larger than the
overlap, cut by all of them (the parts are joined).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from pycocotools import mask as coco_mask

from pipeline.contour import fill_instance, join_contours
from pipeline.encode import decode_window
from pipeline.long_runs import find_columns, share_columns
from pipeline.runs import is_long
from pipeline.types import Detection, Int64, Window

DUPLICATE_IOU = 0.5
"""Two masks of different tiles are one object above this IoU."""
CONTAINED = 0.5
"""A cut mask is a duplicate if a kept one covers more than this share of it."""
AGREEMENT = 0.5
"""Two cut masks are parts of one object above this IoU inside the region both tiles see."""


@dataclass(frozen=True)
class TileInstance:
    """An instance, in coordinates of the image, and the tile that it was found in.

    Attributes:
        instance: What was found.
        window: The tile's region of the image.
        cut: Whether the mask reaches a border of the tile behind which the image goes on.
        elsewhere: Another tile that shows all of the mask and what lies beyond those borders.
        number: Its place among the tile's instances.
    """

    instance: Detection
    window: Window
    cut: bool
    elsewhere: Window | None = None
    number: int = 0


Rank = tuple[float, bool, float, int, int, int]


@dataclass(frozen=True)
class Ranked:
    """A merged instance.

    Attributes:
        rank: Orders the instances of an image, the best first, whichever are merged together.
        instance: The instance.
    """

    rank: Rank
    instance: Detection


def intersect(a: Window, b: Window) -> Window:
    """What two windows share; without height or width if that is nothing."""
    y, x = max(a.y, b.y), max(a.x, b.x)
    height = min(a.y + a.height, b.y + b.height) - y
    width = min(a.x + a.width, b.x + b.width) - x
    return Window(y, x, max(height, 0), max(width, 0))


def _find_in(region: Window, members: Int64, boxes: Int64) -> list[int]:
    """Those of some members whose boxes [N, 4] as x, y, width, height reach a region."""
    x, y, width, height = boxes[members].T
    reach = (x < region.x + region.width) & (region.x < x + width)
    reach &= (y < region.y + region.height) & (region.y < y + height)
    found: list[int] = members[reach].tolist()
    return found


def _area_inside(instance: Detection, region: Window) -> int:
    return int(np.count_nonzero(decode_window(instance, region)))


def _neighbours(windows: Collection[Window]) -> Iterator[tuple[Window, Window]]:
    """Pairs of windows that overlap, each once; far windows are never compared."""
    rows, columns = len({window.y for window in windows}), len({window.x for window in windows})
    along_y = rows >= columns  # along the longer side, so that few windows start at one place

    def span(window: Window) -> tuple[int, int]:
        if along_y:
            return window.y, window.y + window.height
        return window.x, window.x + window.width

    ordered = sorted(windows, key=span)
    for index, a in enumerate(ordered):
        for place in range(index + 1, len(ordered)):
            b = ordered[place]
            if span(b)[0] >= span(a)[1]:
                break
            overlap = intersect(a, b)
            if overlap.height and overlap.width:
                yield a, b


def _shared_pixels(found: Sequence[TileInstance]) -> dict[int, dict[int, int]]:
    """Pixels shared by masks of one class and different tiles; pairs without any are absent."""
    tiles: dict[Window, list[int]] = defaultdict(list)
    for index, entry in enumerate(found):
        tiles[entry.window].append(index)
    boxes = np.array([entry.instance.bbox_xywh for entry in found])
    indices = {window: np.array(members) for window, members in tiles.items()}
    shared: dict[int, dict[int, int]] = defaultdict(dict)
    for a, b in _neighbours(indices):
        region, in_a, in_b = intersect(a, b), indices[a], indices[b]
        left, right = _find_in(region, in_a, boxes), _find_in(region, in_b, boxes)
        if not left or not right:
            continue
        rles = share_columns(*([found[i].instance for i in side] for side in (left, right)))
        iou = np.asarray(coco_mask.iou(rles[0], rles[1], [0] * len(right)))
        for row, column in np.argwhere(iou > 0):
            i, j = left[row], right[column]
            one, other = found[i].instance, found[j].instance
            if one.label == other.label:
                ratio = iou[row, column]
                pixels = round(ratio * (one.area + other.area) / (1 + ratio))
                shared[i][j] = shared[j][i] = pixels
    return shared


def _is_same(found: Sequence[TileInstance], index: int, kept: int, pixels: int) -> bool:
    """Whether a mask shows no more than a kept one does."""
    area, kept_area = found[index].instance.area, found[kept].instance.area
    if pixels > DUPLICATE_IOU * (area + kept_area - pixels):
        return True
    return found[index].cut and pixels > CONTAINED * area


def _yields(found: Sequence[TileInstance], index: int, shared: Mapping[int, int]) -> bool:
    """Whether a mask is left to another tile, and that tile does not leave it back to this one."""
    entry = found[index]
    return entry.elsewhere is not None and not any(
        (found[j].window, found[j].elsewhere) == (entry.elsewhere, entry.window)
        and pixels > CONTAINED * entry.instance.area
        for j, pixels in shared.items()
    )


def _agreement(found: Sequence[TileInstance], index: int, kept: int, pixels: int) -> float:
    """IoU of two cut masks inside the region that both tiles see."""
    region = intersect(found[index].window, found[kept].window)
    areas = (_area_inside(found[i].instance, region) for i in (index, kept))
    return pixels / (sum(areas) - pixels)


def _union(parts: Sequence[Detection]) -> Detection:
    """One mask of all parts with the best part's score."""
    best = max(parts, key=lambda instance: instance.score)
    if len(parts) == 1:
        return best
    (rles,) = share_columns(parts)
    joined = coco_mask.merge(rles)
    x, y, width, height = (int(v) for v in coco_mask.toBbox(joined))
    rle = {"size": best.rle["size"], "counts": joined["counts"]}
    if is_long(*best.rle["size"]):
        columns = find_columns(parts)
        x, rle = x + columns.x, columns.leave(joined)
    return replace(best, rle=rle, bbox_xywh=(x, y, width, height), area=int(coco_mask.area(joined)))


def find_groups(
    found: Sequence[TileInstance], *, compare: Literal["masks", "enclosed"] = "masks"
) -> list[int]:
    """The group of each mask: masks share a group if shared pixels connect them.

    `merge_tiles` gives the same instances for every group by itself as for all together.
    """
    if compare == "enclosed":
        found = [replace(entry, instance=fill_instance(entry.instance)) for entry in found]
    return label_groups(len(found), _shared_pixels(found) if found else {})


def label_groups(count: int, linked: Mapping[int, Iterable[int]]) -> list[int]:
    """The group of each of some numbers, which links connect; links lead in both directions."""
    groups = [-1] * count
    for start in range(count):
        stack = [start] if groups[start] < 0 else []
        while stack:
            index = stack.pop()
            if groups[index] < 0:
                groups[index] = start
                stack += linked.get(index, ())
    return groups


class _Objects:
    """The kept masks, grouped into objects: one mask, or parts that different tiles show."""

    def __init__(self, found: Sequence[TileInstance]) -> None:
        self.found = found
        self.members: dict[int, list[int]] = {}
        self.object_of: dict[int, int] = {}

    def add(self, index: int) -> None:
        """A mask that is an object of its own."""
        self.members[index] = [index]
        self.object_of[index] = index

    def join(self, index: int, parts: Sequence[int]) -> None:
        """Joins a mask and the objects of the kept parts that it continues, best part first.

        A tile shows an object once: the mask is dropped if its tile has shown the first part's
        object, and objects that one tile shows apart stay apart.
        """
        home, *others = dict.fromkeys(self.object_of[part] for part in parts)
        seen = {self.found[i].window for i in self.members[home]}
        if self.found[index].window in seen:
            return
        self.members[home].append(index)
        self.object_of[index] = home
        seen.add(self.found[index].window)
        for other in others:
            windows = {self.found[i].window for i in self.members[other]}
            if not seen & windows:
                seen |= windows
                moved = self.members.pop(other)
                self.members[home] += moved
                self.object_of.update(dict.fromkeys(moved, home))


def merge_tiles(
    found: Sequence[TileInstance],
    *,
    compare: Literal["masks", "enclosed"] = "masks",
) -> list[Detection]:
    """Instances of all tiles, each object once.

    Whole masks come first, then cut ones; each best first. Only masks of one class and of
    different tiles are compared. A cut mask goes if another tile shows all of it and more, whatever
    that tile found there; any mask goes if a kept one is the same by IoU; a cut one also if a kept
    one covers most of it. Cut masks that agree where both tiles see are joined.

    Args:
        found: Of all tiles, in any order.
        compare: `enclosed` compares the regions that the masks enclose, and of parts that are
            joined the outline remains: for masks that are contours.

    Returns:
        By descending score.
    """
    merged = sorted(merge_ranked(found, compare=compare), key=lambda entry: entry.rank)
    return [entry.instance for entry in merged]


def merge_ranked(
    found: Sequence[TileInstance], *, compare: Literal["masks", "enclosed"] = "masks"
) -> list[Ranked]:
    """As `merge_tiles`, in any order."""
    masks, join = [entry.instance for entry in found], _union
    if compare == "enclosed":
        join = join_contours
        found = [replace(entry, instance=fill_instance(entry.instance)) for entry in found]
    shared = _shared_pixels(found)
    objects = _Objects(found)
    own = [i for i in range(len(found)) if not _yields(found, i, shared.get(i, {}))]
    for index in sorted(own, key=lambda i: (found[i].cut, -found[i].instance.score)):
        kept = [(j, pixels) for j, pixels in shared[index].items() if j in objects.object_of]
        parts = []
        if found[index].cut:
            cut = [(_agreement(found, index, j, pixels), j) for j, pixels in kept if found[j].cut]
            parts = [j for agreement, j in sorted(cut, reverse=True) if agreement > AGREEMENT]
        rest = [(j, pixels) for j, pixels in kept if not (parts and found[j].cut)]
        if any(_is_same(found, index, j, pixels) for j, pixels in rest):
            continue
        if parts:
            objects.join(index, parts)
        else:
            objects.add(index)
    return [
        Ranked(_rank(instance.score, found[home]), instance)
        for home, group in objects.members.items()
        for instance in [join([masks[i] for i in group])]
    ]


def _rank(score: float, home: TileInstance) -> Rank:
    """The rank of a merged instance, whose first part is `home`."""
    window = home.window
    return -score, home.cut, -home.instance.score, window.y, window.x, home.number
