"""Reads COCO JSON one annotation at a time.

The 860,000 annotations of COCO 2017 take gigabytes as Python objects and much less as arrays, so
each is converted before the next one is parsed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()

Polygons = tuple[NDArray[np.float64], ...]
"""The polygons of an object; x and y alternate, px."""


class AnnotationRow(NamedTuple):
    """The used fields of an annotation; the segmentation is None for crowds and empty ones."""

    id: Any
    image_id: int
    category_id: int
    segmentation: Polygons | dict[str, Any] | None


def compact_row(annotation: dict[str, Any]) -> AnnotationRow:
    """The fields of an annotation that training uses.

    Raises:
        ValueError: A polygon is not valid.
    """
    segmentation = annotation["segmentation"]
    if annotation.get("iscrowd", 0) or not segmentation:
        segmentation = None
    elif isinstance(segmentation, list):
        for part in segmentation:
            if not isinstance(part, list) or len(part) < 4 or len(part) % 2:
                raise ValueError(f"annotation {annotation.get('id')} has a polygon of {part!r}")
        segmentation = tuple(np.array(part, np.float64) for part in segmentation)
    return AnnotationRow(
        annotation.get("id"), int(annotation["image_id"]), annotation["category_id"], segmentation
    )


def read_coco_json(path: Path) -> tuple[dict[str, Any], list[AnnotationRow] | None]:
    """Reads an annotation file.

    Returns:
        The top-level object without its annotations, and the annotations; None if the file has
        none, as COCO's files for test images.

    Raises:
        ValueError: It is not JSON, not an object, or an annotation is malformed.
        KeyError: An annotation lacks a field.
        TypeError: A field has another type.
    """
    text = path.read_text()
    content: dict[str, Any] = {}
    rows: list[AnnotationRow] | None = None
    at = _expect(text, 0, "{")
    while text[at : at + 1] != "}":
        key, at = _DECODER.raw_decode(text, at)
        at = _expect(text, at, ":")
        if key == "annotations":
            rows, at = _read_array(text, at, compact_row)
        else:
            content[key], at = _DECODER.raw_decode(text, at)
        at = _next(text, at, "}")
    return content, rows


def _read_array(
    text: str, at: int, convert: Callable[[Any], AnnotationRow]
) -> tuple[list[AnnotationRow], int]:
    """The converted elements of the array at a position, and the position after it."""
    rows = []
    at = _expect(text, at, "[")
    while text[at : at + 1] != "]":
        element, at = _DECODER.raw_decode(text, at)
        rows.append(convert(element))
        at = _next(text, at, "]")
    return rows, at + 1


def _expect(text: str, at: int, sign: str) -> int:
    """The position after a sign and the white space around it."""
    at = _after_space(text, at)
    if text[at : at + 1] != sign:
        raise json.JSONDecodeError(f"expecting {sign!r}", text, at)
    return _after_space(text, at + 1)


def _next(text: str, at: int, end: str) -> int:
    """The position of the next element, or of the end sign."""
    at = _after_space(text, at)
    return at if text[at : at + 1] == end else _expect(text, at, ",")


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None  # the pattern also matches the empty string
    return match.end()
