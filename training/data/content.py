"""A labelled data set as it lies on disk, before anything in it is checked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class CocoContent:
    """One split in COCO's terms; `training.data.validate` checks it.

    Attributes:
        source: What errors name: the file or the folder.
        image_folder: The folder that the file names are relative to.
        images: COCO's images.
        categories: COCO's categories.
        annotations: COCO's annotations, possibly parsed while they are iterated; None for test
            images.
    """

    source: str
    image_folder: Path
    images: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    annotations: Iterable[dict[str, Any]] | None
