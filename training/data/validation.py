"""How much the AP of a validation split says: its images and objects."""

from __future__ import annotations

from training.data.coco import CocoDataset

FEW_IMAGES, FEW_OBJECTS = 20, 200
"""Below one of these numbers, the AP depends on which images were chosen."""
_LISTED = 5


def describe_validation(val: CocoDataset) -> str:
    """The size of a validation split, in a line, with what it cannot tell."""
    objects = _count_objects(val)
    text = f"validation: {len(val)} images with {objects} objects"
    missing = [name for name, count in val.report.classes.items() if not count]
    if objects and missing:
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        text += f", none of {', '.join(missing[:_LISTED])}{more}, which the AP leaves out"
    if _is_small(val):
        text += (
            f"; that is few (less than {FEW_IMAGES} images or {FEW_OBJECTS} objects), so the AP "
            "is only a rough estimate"
        )
    return text


def doubt_validation(val: CocoDataset) -> str | None:
    """`describe_validation` of a split that is too small; None for any other."""
    return describe_validation(val) if _is_small(val) else None


def _is_small(val: CocoDataset) -> bool:
    return len(val) < FEW_IMAGES or _count_objects(val) < FEW_OBJECTS


def _count_objects(val: CocoDataset) -> int:
    return sum(len(record.objects) for record in val.records)
