"""How far two answers for the same image agree, from their COCO instances.

Instances of one class are matched one to one, the pair of highest IoU first, above `MATCH_IOU`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.mask_iou import measure_iou

MATCH_IOU = 0.5


@dataclass(frozen=True)
class AnswerMatch:
    """The matches of two answers.

    Attributes:
        ious: Mask IoU of each matched pair.
        score_differences: The second's score minus the first's, of each pair.
        unmatched: Instances of each answer that have no partner.
    """

    ious: tuple[float, ...]
    score_differences: tuple[float, ...]
    unmatched: tuple[int, int]

    @property
    def quality(self) -> float:
        """Panoptic quality: the sum of IoUs over the mean number of instances, 1 without any."""
        mean_count = len(self.ious) + sum(self.unmatched) / 2
        return sum(self.ious) / mean_count if mean_count else 1.0


def compare_instances(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> AnswerMatch:
    """Compares two answers for an image.

    Args:
        first: COCO instances with `category_id`, `score` and a compressed RLE `segmentation`.
        second: Alike.

    Raises:
        ValueError: Masks are of different sizes.
    """
    sizes = {tuple(instance["segmentation"]["size"]) for instance in (*first, *second)}
    if len(sizes) > 1:
        raise ValueError(f"the masks are of different sizes: {sorted(sizes)}")
    if not first or not second:
        return AnswerMatch((), (), (len(first), len(second)))
    ious = measure_iou(first, second)
    pairs = np.argwhere(ious > MATCH_IOU)
    pairs = pairs[np.argsort(-ious[tuple(pairs.T)], kind="stable")]
    taken: tuple[set[int], set[int]] = set(), set()
    matched: list[tuple[int, int]] = []
    for row, column in pairs.tolist():
        if row not in taken[0] and column not in taken[1]:
            taken[0].add(row)
            taken[1].add(column)
            matched.append((row, column))
    return AnswerMatch(
        tuple(float(ious[pair]) for pair in matched),
        tuple(second[j]["score"] - first[i]["score"] for i, j in matched),
        (len(first) - len(matched), len(second) - len(matched)),
    )
