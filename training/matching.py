"""Instances and objects of an image, matched one to one.

Symbols: N instances, M objects.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.mask_iou import Entry, Float64


def rank(results: Sequence[Entry]) -> list[Entry]:
    """COCO results, best first; those of equal scores keep their order."""
    return sorted(results, key=lambda result: -float(result["score"]))


def match(iou: Float64, threshold: float) -> list[int | None]:
    """The object of each instance: of those that no earlier instance has, the one of largest IoU.

    Args:
        iou: [N, M], instances best first.
        threshold: Least IoU of a match, above 0.
    """
    free = iou.copy()
    found: list[int | None] = []
    for row in free:
        best = int(row.argmax()) if row.size else -1
        if best < 0 or row[best] < threshold:
            found.append(None)
            continue
        found.append(best)
        free[:, best] = -1
    return found
