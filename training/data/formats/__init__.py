"""Label formats: finds the one of a folder and reads it in COCO's terms."""

from __future__ import annotations

import argparse
import logging
import os
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

from pycocotools import mask as coco_mask
from tqdm import tqdm

from training.data.content import CocoContent
from training.data.formats import coco, cvat, label_images, labelme, voc, yolo
from training.data.formats.source import NAMES, Entry, Source, split_name
from training.data.formats.splits import divide_given
from training.data.records import DatasetError

__all__ = ["FORMATS", "add_format_options", "choose_format", "list_splits", "open_dataset"]

FORMATS: dict[str, ModuleType] = {
    "coco": coco,
    "yolo": yolo,
    "labelme": labelme,
    "cvat": cvat,
    "voc": voc,
    "masks": label_images,
}
"""The modules that read each format."""

_log = logging.getLogger(__name__)


def add_format_options(parser: argparse._ActionsContainer) -> None:
    """The options of all commands that read labelled images."""
    parser.add_argument(
        "--format", choices=list(FORMATS), help="format of the labels (default: found by itself)"
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        metavar="F",
        help="share of the images for validation if the data set has no split for it (if it has no "
        "splits: 0.2, but at least 5 images or a third; 0: none); images named alike but for a "
        "number at the end (a_1, a_2) stay together",
    )


def choose_format(root: Path, format: str | None) -> str:
    """The format that is asked for, or else that of the labels in a folder.

    Raises:
        DatasetError: The folder, the format or its labels are missing, or several formats fit.
    """
    if root.is_file():
        raise DatasetError(f"{root} is a file; give the folder that holds it and its images")
    if not root.is_dir():
        raise DatasetError(f"{root} is not a folder")
    if format is not None and format not in FORMATS:
        raise DatasetError(f"the format {format!r} is not one of {', '.join(FORMATS)}")
    if format is not None:
        return format
    found = {name: why for name, module in FORMATS.items() if (why := module.find(root))}
    if not found:
        formats = ", ".join(FORMATS)
        raise DatasetError(
            f"{root} has no labels of a known format ({formats}), only {_list_kinds(root)}"
        )
    if len(found) > 1:
        candidates = ", ".join(f"{name} ({why})" for name, why in found.items())
        raise DatasetError(f"{root} may be {candidates}; choose one with --format")
    return next(iter(found))


def _list_kinds(root: Path) -> str:
    """What lies in a folder, as `40 .jpg files, 2 folders`."""
    kinds = Counter(
        "folders" if path.is_dir() else f"{path.suffix.lower() or 'other'} files"
        for path in root.iterdir()
    )
    found = [f"{count} {kind}" for kind, count in kinds.most_common(3)]
    return ", ".join(found) or "an empty folder"


def list_splits(root: Path, format: str | None = None) -> list[str]:
    """The splits that are given in a folder; [""] if its pictures are not divided."""
    name = choose_format(root, format)
    if name == "coco":
        return coco.list_splits(root)
    source: Source = FORMATS[name].open_source(root)
    given = {entry.split for entry in source.entries}
    return [split for split in NAMES if split in given] or [""]


def open_dataset(
    data: Path,
    split: str,
    format: str | None = None,
    val_fraction: float | None = None,
) -> CocoContent:
    """Reads a split of a data set; what is left out or changed is logged.

    Args:
        data: The folder.
        split: train, val, test, or for COCO the name of an annotation file; "" for all pictures.
        format: A key of `FORMATS`; by default it is found.
        val_fraction: Share of the pictures for validation, if there is no split for it.

    Raises:
        DatasetError: One line that names the file and the value.
    """
    name = choose_format(data, format)
    if name == "coco":
        return coco.open_coco(data, split, val_fraction)
    source: Source = FORMATS[name].open_source(data)
    if not source.entries:
        raise DatasetError(f"{data} has no images with {name} labels")
    entries = _select(source.entries, split, val_fraction, data)
    content = _build(source, entries, data)
    for line in source.notes.lines():
        _log.warning("%s %s: %s", data, split or "all", line)
    return content


def _select(entries: list[Entry], split: str, fraction: float | None, root: Path) -> list[Entry]:
    """The pictures of a split."""
    if not split:
        return entries
    given = {entry.split for entry in entries} - {""}
    wanted = split_name(split)
    if not given:
        return divide_given(entries, _stem, "", split, fraction, root)
    if fraction and wanted in ("train", "val"):
        if "val" in given:
            raise DatasetError(f"{root} has a split for validation; leave the fraction out")
        train = [entry for entry in entries if entry.split == "train"]
        return divide_given(train, _stem, "train", split, fraction, root)
    chosen = [entry for entry in entries if entry.split == wanted]
    if not chosen:
        names = ", ".join(sorted(given))
        hint = "; --val-fraction divides train" if wanted == "val" and "train" in given else ""
        raise DatasetError(f"{root} has no split {split!r}, only {names}{hint}")
    undivided = [entry for entry in entries if not entry.split]
    if undivided:
        _log.warning(
            "%s: %d images outside of %s are not used (first: %s)",
            root, len(undivided), ", ".join(sorted(given)), undivided[0].labels,
        )  # fmt: skip
    return chosen


def _stem(entry: Entry) -> str:
    return entry.image.stem


def _build(source: Source, entries: list[Entry], root: Path) -> CocoContent:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, entry in enumerate(tqdm(entries, "labels", disable=None, leave=False), 1):
        picture = source.read(entry)
        height, width = picture.frame.upright_hw
        file_name = os.path.relpath(entry.image, root)
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for label, segmentation in picture.objects:
            rle = segmentation
            if isinstance(segmentation, list):
                rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label + 1,
                    "segmentation": segmentation,
                    "area": float(coco_mask.area(rle)),
                    "bbox": [float(value) for value in coco_mask.toBbox(rle)],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": label, "name": name} for label, name in enumerate(source.classes, 1)]
    return CocoContent(str(root), root, images, categories, annotations)
