"""`merge_tiles` and `resolve_overlaps` for slides: row by row of tiles, in constant memory.

Masks that share no pixels, directly or through others, do not influence each other. A group of
such masks is complete when none of them reaches into the rows that are still to come.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from pycocotools import mask as coco_mask

from pipeline.long_runs import share_columns
from pipeline.merge import Ranked, TileInstance, find_groups, label_groups, merge_ranked
from pipeline.overlaps import resolve_overlaps
from pipeline.postprocess import Overlaps
from pipeline.types import Detection


class StreamMerger:
    """Merges tiles that come row by row.

    Args:
        compare: As `merge_tiles`.
        waiting: What an earlier merger had waiting.

    Attributes:
        waiting: Instances whose group may still grow.
    """

    def __init__(
        self,
        compare: Literal["masks", "enclosed"] = "masks",
        waiting: Sequence[TileInstance] = (),
    ) -> None:
        self.waiting = list(waiting)
        self._compare = compare

    def add(self, found: Sequence[TileInstance], next_y: int | None) -> list[Ranked]:
        """Takes the instances of a row of tiles.

        Args:
            found: Of all tiles of the row, in their order.
            next_y: First row of pixels of the next row of tiles; None after the last one.

        Returns:
            Merged instances of the groups that are complete, each group once.
        """
        entries = [*self.waiting, *found]
        members = defaultdict(list)
        for index, group in enumerate(find_groups(entries, compare=self._compare)):
            members[group].append(entries[index])
        self.waiting = []
        complete: list[Ranked] = []
        for group_entries in members.values():
            if any(_reaches(entry.instance, next_y) for entry in group_entries):
                self.waiting += group_entries
            else:
                complete += merge_ranked(group_entries, compare=self._compare)
        self.waiting.sort(key=lambda entry: (entry.window.y, entry.window.x))
        return complete

    def first_open(self, next_y: int | None) -> int | None:
        """The first row of pixels of what is still to come; None if nothing is."""
        tops = [entry.instance.bbox_xywh[1] for entry in self.waiting]
        return None if next_y is None else min([next_y, *tops])


class StreamResolver:
    """Gives each pixel to one of the merged instances, which come row by row.

    Args:
        overlaps: `keep` leaves them as they are.
        waiting: What an earlier resolver had waiting.

    Attributes:
        waiting: Instances whose group may still grow.
    """

    def __init__(self, overlaps: Overlaps, waiting: Sequence[Ranked] = ()) -> None:
        self.waiting = list(waiting)
        self._keeps = overlaps == "keep"

    def add(self, merged: Sequence[Ranked], open_y: int | None) -> list[Detection]:
        """Takes merged instances.

        Args:
            merged: In any order.
            open_y: First row of pixels of instances that are still to come; None if none are.

        Returns:
            What is left of the instances of the groups that are complete.
        """
        if self._keeps:
            return [entry.instance for entry in merged]
        entries = [*self.waiting, *merged]
        members = defaultdict(list)
        linked = _link([entry.instance for entry in entries])
        for index, group in enumerate(label_groups(len(entries), linked)):
            members[group].append(entries[index])
        self.waiting = []
        complete: list[Detection] = []
        for group_entries in members.values():
            if any(_reaches(entry.instance, open_y) for entry in group_entries):
                self.waiting += group_entries
            else:
                group_entries.sort(key=lambda entry: entry.rank)
                complete += resolve_overlaps([entry.instance for entry in group_entries])
        return complete


def _reaches(instance: Detection, next_y: int | None) -> bool:
    """Whether a mask has pixels in a row or below it."""
    _, y, _, height = instance.bbox_xywh
    return next_y is not None and y + height > next_y


def _link(instances: Sequence[Detection]) -> dict[int, list[int]]:
    """The instances that share pixels with each one."""
    boxes = np.array([i.bbox_xywh for i in instances], np.int64).reshape(-1, 4)
    order = np.argsort(boxes[:, 1], kind="stable")
    starts, ends = boxes[order, :2], boxes[order, :2] + boxes[order, 2:]
    linked: dict[int, list[int]] = defaultdict(list)
    for place, index in enumerate(order.tolist()):
        last = int(np.searchsorted(starts[:, 1], ends[place, 1], side="left"))
        near = slice(place + 1, last)
        beside = (starts[near, 0] < ends[place, 0]) & (ends[near, 0] > starts[place, 0])
        others = order[near][beside].tolist()
        for other in _keep_touching(instances, index, others):
            linked[index].append(other)
            linked[other].append(index)
    return linked


def _keep_touching(
    instances: Sequence[Detection], index: int, others: Sequence[int]
) -> Iterable[int]:
    if not others:
        return ()
    rles, one = share_columns([instances[other] for other in others], [instances[index]])
    shared = np.asarray(coco_mask.iou(rles, one, [0])).ravel()
    return [other for other, iou in zip(others, shared.tolist(), strict=True) if iou > 0]
