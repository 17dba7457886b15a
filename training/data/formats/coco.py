"""COCO JSON in the layouts of COCO itself, of Roboflow, and as one file for all pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from training.data.coco_json import find_split, read_coco_json
from training.data.content import CocoContent
from training.data.formats.files import read_start
from training.data.formats.source import NAMES, split_name
from training.data.formats.splits import divide_given
from training.data.records import DatasetError

_ROBOFLOW = "_annotations.coco.json"


def find(root: Path) -> str | None:
    """Why the folder looks like this format."""
    files = [*sorted((root / "annotations").glob("*.json")), *sorted(root.glob(f"*/{_ROBOFLOW}"))]
    for path in [*files, *_single_files(root)]:
        if b'"shapes"' not in read_start(path):
            return str(path.relative_to(root))
    return None


def _single_files(root: Path) -> list[Path]:
    """Files in the folder itself that look like COCO JSON."""
    files = sorted(root.glob("*.json"))
    return [path for path in files if b'"annotations"' in (start := read_start(path))
            or (b'"images"' in start and b'"categories"' in start)]  # fmt: skip


def list_splits(root: Path) -> list[str]:
    """The splits that the files stand for; [""] for one file that stands for none."""
    found = {}
    for path in sorted((root / "annotations").glob("*.json")):
        name = path.stem.removeprefix("instances_").removesuffix("2017")
        found[split_name(name)] = True
    for path in root.glob(f"*/{_ROBOFLOW}"):
        found[split_name(path.parent.name)] = True
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
    if split and (fraction is None or split_name(split) not in ("train", "val")):
        found = _locate(root, split)
        if found is not None:
            return read_coco_json(*found)
    file, folder, given = _find_whole(root, split, fraction)
    content = read_coco_json(file, folder)
    if not split:
        return content
    try:
        stems = [Path(str(image["file_name"])).stem for image in content.images]
        ids = [image["id"] for image in content.images]
    except (KeyError, TypeError) as error:
        raise DatasetError(f"{file} has an image without id and file_name") from error
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


def _locate(root: Path, split: str) -> tuple[Path, Path] | None:
    """Annotation file and image folder of a given split; None if one file is to be divided."""
    for name in dict.fromkeys((split, *NAMES.get(split_name(split), ()))):
        if (root / name / _ROBOFLOW).is_file():
            return root / name / _ROBOFLOW, root / name
    try:
        return find_split(root, split)
    except DatasetError:
        for name in NAMES.get(split_name(split), ()):
            if (root / "annotations" / f"{name}.json").is_file():
                return find_split(root, name)
        if split_name(split) in ("train", "val") and _unnamed(root) is not None:
            return None
        raise


def _unnamed(root: Path) -> Path | None:
    """The only annotation file, if its name stands for no split."""
    files = [*sorted((root / "annotations").glob("*.json")), *_single_files(root)]
    if len(files) != 1 or list(root.glob(f"*/{_ROBOFLOW}")):
        return None
    name = files[0].stem.removeprefix("instances_").removesuffix("2017")
    return None if split_name(name) else files[0]


def _find_whole(root: Path, split: str, fraction: float | None) -> tuple[Path, Path, str]:
    """The file to divide, its image folder, and the split that it stands for."""
    file = _unnamed(root)
    if file is not None:
        inner = root / "images"
        return file, inner if inner.is_dir() else file.parent, ""
    if fraction is not None and split_name(split) in ("train", "val"):
        try:
            own = _locate(root, "val")
        except DatasetError:
            own = None
        if own is not None:
            raise DatasetError(
                f"{root} has a split for validation, {own[0]}; leave the fraction out"
            )
    found = _locate(root, "train" if split_name(split) in ("train", "val") else split)
    if found is None or not split:
        raise DatasetError(f"{root} has no single annotation file")
    return *found, "train"
