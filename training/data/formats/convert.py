"""Writes a data set of any format as COCO JSON."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service.files import replace_text
from training.data.content import CocoContent
from training.data.formats import choose_format, labelme, list_splits, open_dataset
from training.data.formats.splits import list_divided
from training.data.records import DatasetError


def convert(
    data: Path,
    to: Path,
    *,
    splits: Sequence[str] = (),
    format: str | None = None,
    val_fraction: float | None = None,
    extract_images: bool = False,
) -> list[str]:
    """Writes COCO JSON; returns a line for each file.

    Args:
        data: The folder to read.
        to: A JSON file for one split or all images, which then names the images where they are; or
            a new folder, which gets `annotations/{split}.json` and copies of the images.
        splits: The splits; by default all, and for a folder train and val if there are none.
        format: Format of the labels; by default it is found.
        val_fraction: As of `open_dataset`.
        extract_images: Write images that LabelMe's files embed beside these files if missing.

    Raises:
        DatasetError: The data set cannot be read, or the target exists.
    """
    if extract_images:
        labelme.extract_images(data)
    if to.exists() and (to.is_file() or any(to.iterdir())):
        raise DatasetError(f"{to} exists")
    if to.suffix.lower() == ".json":
        if len(splits) > 1:
            raise DatasetError(f"{to} is one file, give one split, not {', '.join(splits)}")
        content = open_dataset(data, _single_split(data, splits, format), format, val_fraction)
        names = {n: os.path.relpath(content.image_folder / n, to.parent) for n in _names(content)}
        return [write_content(content, names, to)]
    given = list(splits) or list_divided(list_splits(data, format), val_fraction)
    contents = {split: open_dataset(data, split, format, val_fraction) for split in given}
    lines = []
    copied: dict[str, Path] = {}
    for split, content in contents.items():
        names = name_copies(content, data)
        copy_images(content, names, to, copied)
        lines.append(write_content(content, names, to / "annotations" / f"{split}.json"))
    return lines


def name_copies(content: CocoContent, root: Path) -> dict[str, str]:
    """Where in the folder `images` each picture of a data set is copied, by its file name."""
    return {name: _copied_name(content.image_folder / name, root) for name in _names(content)}


def copy_images(
    content: CocoContent, names: dict[str, str], to: Path, copied: dict[str, Path]
) -> None:
    """Copies pictures into `to/images`.

    Args:
        content: The data set.
        names: Where each picture goes.
        to: The folder of the new data set.
        copied: The pictures that are there already, by their new names; is extended.

    Raises:
        DatasetError: Two pictures would have the same name, or one cannot be copied.
    """
    for name, target in names.items():
        source = content.image_folder / name
        if copied.setdefault(target, source) != source:
            raise DatasetError(f"{copied[target]} and {source} would both be images/{target}")
        (to / "images" / target).parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(source, to / "images" / target)
        except OSError as error:
            raise DatasetError(f"{source} cannot be copied: {error.strerror}") from error


def _single_split(data: Path, splits: Sequence[str], format: str | None) -> str:
    """The split to write into one file; "" for all images."""
    if splits or choose_format(data, format) != "coco":
        return splits[0] if splits else ""
    given = list_splits(data, "coco")
    if len(given) > 1:
        raise DatasetError(f"{data} has the splits {', '.join(given)}: choose one with --split")
    return given[0]


def _names(content: CocoContent) -> list[str]:
    try:
        return [str(image["file_name"]) for image in content.images]
    except (KeyError, TypeError) as error:
        raise DatasetError(f"{content.source} has an image without file_name") from error


def _copied_name(image: Path, root: Path) -> str:
    """Where in `images` a picture goes: as it lies in the data set, or by its name alone."""
    name = os.path.relpath(image, root)
    if name.startswith(".."):
        return image.name
    return name.removeprefix("images" + os.sep)


def write_content(content: CocoContent, names: dict[str, str], path: Path) -> str:
    """Writes one file, which appears only when it is complete; returns what it has, in a line."""
    images = [
        {**image, "file_name": Path(names[str(image["file_name"])]).as_posix()}
        for image in content.images
    ]
    written: dict[str, Any] = {"images": images, "categories": content.categories}
    count = "no annotations"
    if content.annotations is not None:
        written["annotations"] = list(content.annotations)
        count = f"{len(written['annotations'])} objects"
    replace_text(path, json.dumps(written, allow_nan=False))
    return f"{path}: {len(images)} images, {count}, {len(content.categories)} classes"
