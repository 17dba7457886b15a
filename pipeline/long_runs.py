"""Masks of images of 2^32 pixels and more, whose run lengths do not fit pycocotools' 32 bits.

The text of COCO's run lengths has no bound; pycocotools takes the part of the image in which masks
that are compared lie: some of its columns, which are a contiguous part of the column-major pixels.

Symbols: H W image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask

from pipeline.runs import is_long, read_counts, write_counts
from pipeline.types import Detection, Int64


@dataclass(frozen=True)
class Columns:
    """Columns of an image.

    Attributes:
        image_hw: H and W.
        x, width: The first column, and how many there are.
    """

    image_hw: tuple[int, int]
    x: int
    width: int

    def enter(self, instance: Detection) -> dict[str, Any]:
        """The mask of an instance that lies in the columns, as RLE of them alone."""
        height, width = self.image_hw
        counts = self._extend(read_counts(instance.rle["counts"], height * width), -1)
        size = [height, self.width]
        packed: dict[str, Any] = coco_mask.frPyObjects(
            {"size": size, "counts": counts.tolist()}, *size
        )
        return packed

    def leave(self, rle: dict[str, Any]) -> dict[str, Any]:
        """The RLE of the image for one of the columns."""
        height, width = self.image_hw
        counts = self._extend(read_counts(rle["counts"], height * self.width), 1)
        return {"size": [height, width], "counts": write_counts(counts)}

    def _extend(self, counts: Int64, sign: Literal[-1, 1]) -> Int64:
        """Run lengths with the pixels of the other columns added, or with -1 taken away."""
        height, width = self.image_hw
        if not len(counts) % 2:  # the mask ends with the last column
            counts = np.append(counts, 0)
        counts[0] += sign * height * self.x
        counts[-1] += sign * height * (width - self.x - self.width)
        return counts[: None if counts[-1] else -1]


def find_columns(instances: Sequence[Detection]) -> Columns:
    """The columns of an image in which some instances lie; of a small image all of them."""
    height, width = instances[0].rle["size"]
    boxes = np.array([instance.bbox_xywh for instance in instances], np.int64)
    x = int(boxes[:, 0].min())
    return Columns((height, width), x, int((boxes[:, 0] + boxes[:, 2]).max()) - x)


def share_columns(*groups: Sequence[Detection]) -> list[list[dict[str, Any]]]:
    """The RLEs of groups of instances of one image, such that pycocotools can compare them."""
    every = [instance for group in groups for instance in group]
    if not every or not is_long(*every[0].rle["size"]):
        return [[instance.rle for instance in group] for group in groups]
    columns = find_columns(every)
    return [[columns.enter(instance) for instance in group] for group in groups]
