"""Small data sets through the checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.tiny import annotation_of, disc
from training.data.content import CocoContent
from training.data.report import Kind
from training.data.validate import Checked, Size, check_content

HEIGHT = 20
WIDTH = 30
MASK = disc(HEIGHT, WIDTH, 8, 9, 5)
IMAGE = {"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}
CATEGORY = {"id": 3, "name": "disc"}


def annotation(**changes: Any) -> dict[str, Any]:
    return {"id": 4711, **annotation_of(MASK, 1, 3), **changes}


def check(
    *annotations: Any, images: Any = None, categories: Any = None, size: Size | None = None
) -> Checked:
    content = CocoContent(
        "train.json",
        Path("images"),
        [IMAGE] if images is None else images,
        [CATEGORY] if categories is None else categories,
        annotations,
    )
    return check_content(content, None if size is None else lambda _, names: [size] * len(names))


def kinds(checked: Checked) -> set[Kind]:
    return {kind for kind in Kind if checked.report.count(kind)}
