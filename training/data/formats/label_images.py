"""Label images, in which each value is an object, and folders with one mask file per object."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from training.data.formats.files import PICTURES, read_mask, read_text, walk
from training.data.formats.frame import LabelNotes, Segmentation, open_frame
from training.data.formats.source import Entry, Labelled, Source, split_of
from training.data.records import DatasetError

_MASK_FOLDERS = ("masks", "mask", "labels", "label", "instances", "label_images", "gt")
_IMAGE_FOLDERS = ("images", "image", "imgs", "img")
_SUFFIX = re.compile(r"[-_](cp_masks|masks?|labels?|instances?|seg)$", re.IGNORECASE)


def find(root: Path) -> str | None:
    """Why the folder looks like this format."""
    folders = {
        path.parent.relative_to(root) for path in walk(root, PICTURES) if _is_mask(path, root)
    }
    return f"{min(folders)} has masks" if folders else None


def _is_mask(path: Path, root: Path) -> bool:
    folders = [folder.lower() for folder in path.relative_to(root).parts[:-1]]
    if any(folder in _MASK_FOLDERS for folder in folders):
        return True
    return not any(f in _IMAGE_FOLDERS for f in folders) and bool(_SUFFIX.search(path.stem))


def open_source(root: Path) -> Source:
    """Pairs pictures and masks; all objects are of one class."""
    notes = LabelNotes()
    pictures: dict[tuple[str, ...], Path] = {}
    masks: dict[tuple[str, ...], list[Path]] = defaultdict(list)
    in_folder: dict[tuple[str, ...], list[Path]] = defaultdict(list)
    for path in walk(root, PICTURES):
        key = _key(path, root)
        if _is_mask(path, root):
            masks[key].append(path)
        elif key in pictures:
            raise DatasetError(f"{path} and {pictures[key]} have the same name")
        else:
            pictures[key] = path
            in_folder[key[:-1]].append(path)
    found: dict[Path, list[Path]] = defaultdict(list)
    one_each = set()
    for key, files in masks.items():
        if key in pictures:
            if len(files) > 1:
                raise DatasetError(f"{files[0]} and {files[1]} are both masks of {pictures[key]}")
            found[pictures[key]] += files
        elif len(in_folder[key[:-1]]) == 1:
            found[in_folder[key[:-1]][0]] += files
            one_each.add(in_folder[key[:-1]][0])
        else:
            raise DatasetError(f"{files[0]} has no image of the same name")
    for picture in pictures.values():
        if picture not in found:
            notes.add("images without masks left out", str(picture))
    entries = [
        Entry(picture, files[0], split_of(picture, root), (files, picture in one_each))
        for picture, files in sorted(found.items())
    ]
    names = root / "classes.txt"
    listed = read_text(names).split("\n")[:1] if names.is_file() else []
    name = listed[0].strip() if listed and listed[0].strip() else "object"
    return Source((name,), entries, lambda entry: _read(entry, notes), notes)


def _key(path: Path, root: Path) -> tuple[str, ...]:
    """What a picture and its mask have in common: the path without the folders of the kind."""
    *folders, _ = path.relative_to(root).parts
    kept = [f for f in folders if f.lower() not in _MASK_FOLDERS + _IMAGE_FOLDERS]
    stem = path.stem.removesuffix(".ome")
    stem = _SUFFIX.sub("", stem) if _is_mask(path, root) else stem
    return (*kept, stem)


def _read(entry: Entry, notes: LabelNotes) -> Labelled:
    files, one_each = entry.content
    frame = None
    objects: list[tuple[int, Segmentation]] = []
    for file in files:
        pixels = read_mask(file)
        if one_each:
            pixels = np.asarray(pixels.any(2) if pixels.ndim == 3 else pixels != 0).astype(np.uint8)
        if pixels.ndim != 2:
            raise DatasetError(f"{file} has {pixels.shape[2]} channels, a label image has one")
        if frame is None:
            height, width = pixels.shape
            frame = open_frame(entry.image, str(file), notes, (height, width))
        values = [int(value) for value in np.unique(pixels) if value]
        if values == [255]:
            notes.add(
                "label images with the single value 255, one object; if that is the class of "
                "several, their borders are lost",
                str(file),
            )
        if not values and one_each:
            notes.add("empty masks left out", str(file))
        for value in values:
            rle = frame.mask(pixels == value, str(file))
            if rle is not None:
                objects.append((0, rle))
    assert frame is not None  # an entry has at least one file
    return Labelled(frame, objects)
