"""Instances of a slide's tiles are merged row by row of tiles: `merge_tiles` in constant memory.

Masks that share no pixels, directly or through others, do not influence each other. A group of
such masks is complete when none of them reaches into the rows that are still to come.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from pipeline.merge import TileInstance, find_groups, merge_tiles
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

    def add(self, found: Sequence[TileInstance], next_y: int | None) -> list[Detection]:
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
        complete: list[Detection] = []
        for group_entries in members.values():
            if next_y is not None and any(_end(entry) > next_y for entry in group_entries):
                self.waiting += group_entries
            else:
                complete += merge_tiles(group_entries, compare=self._compare)
        self.waiting.sort(key=lambda entry: (entry.window.y, entry.window.x))
        return complete


def _end(entry: TileInstance) -> int:
    """The row of pixels after the last one of a mask."""
    _, y, _, height = entry.instance.bbox_xywh
    return y + height
