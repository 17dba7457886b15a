"""COCO JSON in the layouts of COCO itself, of Roboflow, and as one file for all pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from training.data.coco_json import read_coco_json
from training.data.content import CocoContent
from training.data.formats.coco_files import (
    ROBOFLOW,
    find_images,
    find_single_file,
    find_split,
    list_files,
    list_split_files,
    split_of_stem,
)
from training.data.formats.files import read_start
from training.data.formats.source import NAMES, split_name
from training.data.formats.splits import divide_given
from training.data.records import DatasetError
from training.data.report import shorten


def find(root: Path) -> str | None:
    """Why the folder looks like this format."""
    for path in [*list_files(root), *sorted(root.glob(f"*/{ROBOFLOW}"))]:
        if b'"shapes"' not in read_start(path):
            return str(path.relative_to(root))
    return None


def list_splits(root: Path) -> list[str]:
    """The splits that the files stand for; [""] for one file that stands for none."""
    if find_single_file(root) is not None:
        return [""]
    found = {split_of_stem(path.stem) for path in list_files(root)}
    found |= {split_name(path.parent.name) for path in root.glob(f"*/{ROBOFLOW}")}
    return [split for split in NAMES if split in found] or [""]


def open_coco(root: Path, split: str, fraction: float | None = None) -> CocoContent:
    """Reads a split; the annotations are parsed while they are iterated.

    Args:
        root: Folder of the data set.
        split: Name of the split or of an annotation file; "" for the only file there is.
        fraction: Share of the pictures for validation, if there is no split for it.

    Raises:
        DatasetError: There are no such annotations, or they are not COCO JSON.
    """
    if split and (not fraction or split_name(split) not in ("train", "val")):
        found = find_split(root, split)
        if found is not None:
            return _read(found, root, split)
    file, given = _find_whole(root, split, fraction)
    content = _read(file, root, given)
    if not split:
        return content
    listed: Any = content.images  # not checked yet
    if not isinstance(listed, list):
        raise DatasetError(f"{file}: images is {shorten(listed)}, expected a list")
    stems, ids = [], []
    for place, image in enumerate(listed):
        if not isinstance(image, dict) or not {"id", "file_name"} <= image.keys():
            raise DatasetError(f"{file}: images[{place}] has no id and file_name: {shorten(image)}")
        stems.append(Path(str(image["file_name"])).stem)
        ids.append(image["id"])
    chosen = divide_given(list(range(len(ids))), stems.__getitem__, given, split, fraction, root)
    kept = {str(ids[index]) for index in chosen}
    annotations = content.annotations
    return replace(
        content,
        images=[content.images[index] for index in chosen],
        annotations=None if annotations is None else _OfImages(annotations, kept),
    )


@dataclass(frozen=True)
class _OfImages:
    """The annotations of some images, filtered while they are iterated."""

    annotations: Iterable[dict[str, Any]]
    image_ids: set[str]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for annotation in self.annotations:
            named = isinstance(annotation, dict) and "image_id" in annotation
            if not named or str(annotation["image_id"]) in self.image_ids:
                yield annotation


def _read(file: Path, root: Path, split: str) -> CocoContent:
    return find_images(read_coco_json(file, file.parent), root, split)


def _find_whole(root: Path, split: str, fraction: float | None) -> tuple[Path, str]:
    """The file to divide, and the split that it stands for."""
    file = find_single_file(root)
    if file is not None:
        return file, ""
    divided = split_name(split) in ("train", "val")
    own = list_split_files(root, "val") if fraction and divided else []
    if own:
        raise DatasetError(f"{root} has a split for validation, {own[0]}; leave the fraction out")
    found = find_split(root, "train" if divided else split)
    if found is None or not split:
        raise DatasetError(f"{root} has no single annotation file")
    return found, "train"
