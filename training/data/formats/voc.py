"""Pascal VOC: SegmentationObject and SegmentationClass, one image of each per picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.data.formats.files import PICTURES, read_mask, read_text, walk
from training.data.formats.frame import LabelNotes, Segmentation, open_frame
from training.data.formats.source import Entry, Labelled, Source, split_name, split_of
from training.data.records import DatasetError
from training.data.report import shorten

_BORDER = 255
_BORDER_COLOUR = (224, 224, 192)
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)


def find(root: Path) -> str | None:
    """Why the folder looks like this format."""
    folders = [root, *sorted(path for path in root.glob("*") if path.is_dir())]
    folders += sorted(path for path in root.glob("VOCdevkit/*") if path.is_dir())
    for folder in folders:
        if (folder / "SegmentationObject").is_dir():
            return str((folder / "SegmentationObject").relative_to(root))
    return None


def open_source(root: Path) -> Source:
    """Lists the masks, by ImageSets/Segmentation if there is one."""
    notes = LabelNotes()
    place = find(root)
    assert place is not None or not (root / "SegmentationObject").is_dir()
    if place is None:
        raise DatasetError(f"{root} has no folder SegmentationObject")
    base = (root / place).parent
    colours, classes = _read_classes(base)
    splits = {}
    for path in sorted((base / "ImageSets" / "Segmentation").glob("*.txt")):
        for line in read_text(path).splitlines():
            if line.strip() and split_name(path.stem):
                splits[line.strip()] = split_name(path.stem)
    images = {path.stem: path for path in walk(base / "JPEGImages", PICTURES)}
    entries = []
    masks = {path.stem: path for path in walk(base / "SegmentationObject", PICTURES)}
    for stem in sorted(splits.keys() | masks.keys()):
        path = masks.get(stem, base / "SegmentationObject" / f"{stem}.png")
        image = images.get(stem, base / "JPEGImages" / f"{stem}.jpg")
        entries.append(Entry(image, path, splits.get(stem, "") or split_of(path, root)))

    def read(entry: Entry) -> Labelled:
        return _read(entry, classes, colours, notes)

    return Source(classes, entries, read, notes)


def _standard_colours(count: int) -> list[tuple[int, int, int]]:
    """VOC's palette: the bits of the index, lowest first, are the highest of red, green, blue."""
    colours = []
    for index in range(count):
        channels = [
            sum(((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(8))
            for channel in range(3)
        ]
        colours.append((channels[0], channels[1], channels[2]))
    return colours


def _read_classes(base: Path) -> tuple[dict[tuple[int, int, int], int], tuple[str, ...]]:
    """Colour -> value of the class, 0 for background; and the class names."""
    path = base / "labelmap.txt"
    if not path.is_file():
        colours = _standard_colours(len(VOC_CLASSES) + 1)
        return {colour: i for i, colour in enumerate(colours)}, VOC_CLASSES
    found: dict[tuple[int, int, int], int] = {}
    names: list[str] = []
    for line_number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        where = f"{path} line {line_number}"
        name, _, rest = line.partition(":")
        try:
            red, green, blue = (int(value) for value in rest.split(":")[0].split(","))
        except ValueError as error:
            raise DatasetError(f"{where}: {shorten(line)} is not name:r,g,b::") from error
        if name.strip().lower() in ("background", "ignored"):
            found[red, green, blue] = 0
            continue
        names.append(name.strip())
        found[red, green, blue] = len(names)
    return found, tuple(names)


def _indices(pixels: NDArray[Any]) -> tuple[NDArray[Any], list[tuple[int, int, int]]]:
    """Colours [H, W, 3] -> numbers [H, W] from 0, and the colour of each."""
    flat = pixels.astype(np.int64) @ np.array([65536, 256, 1])
    values, numbers = np.unique(flat, return_inverse=True)
    colours = [(int(v) >> 16, int(v) >> 8 & 255, int(v) & 255) for v in values]
    return numbers.reshape(flat.shape), colours


def _objects(path: Path) -> NDArray[Any]:
    """The object of each pixel [H, W], 0 for background and borders."""
    pixels = read_mask(path)
    if pixels.ndim == 2:
        return np.where(pixels == _BORDER, 0, pixels)
    numbers, colours = _indices(pixels)
    ids = [0 if c in ((0, 0, 0), _BORDER_COLOUR) else i + 1 for i, c in enumerate(colours)]
    objects: NDArray[Any] = np.array(ids)[numbers]
    return objects


def _classes_of(
    path: Path, classes: tuple[str, ...], colours: dict[tuple[int, int, int], int]
) -> NDArray[Any]:
    """The class of each pixel [H, W] from 1, 0 for background and borders."""
    pixels = read_mask(path)
    if pixels.ndim == 2:
        pixels = np.where(pixels == _BORDER, 0, pixels)
        if pixels.max(initial=0) > len(classes):
            raise DatasetError(
                f"{path} has the class {pixels.max()}, there are {len(classes)} ({classes[0]}, ...)"
            )
        return pixels
    numbers, used = _indices(pixels)
    known = {(0, 0, 0): 0, _BORDER_COLOUR: 0, **colours}
    for colour in used:
        if colour not in known:
            raise DatasetError(f"{path} has the colour {list(colour)}, which labelmap.txt lacks")
    kinds: NDArray[Any] = np.array([known[colour] for colour in used])[numbers]
    return kinds


def _read(
    entry: Entry,
    classes: tuple[str, ...],
    colours: dict[tuple[int, int, int], int],
    notes: LabelNotes,
) -> Labelled:
    path = entry.labels
    class_file = path.parents[1] / "SegmentationClass" / path.name
    numbers, kinds = _objects(path), _classes_of(class_file, classes, colours)
    if numbers.shape != kinds.shape:
        raise DatasetError(
            f"{class_file} is {kinds.shape[1]}x{kinds.shape[0]} px, {path} is "
            f"{numbers.shape[1]}x{numbers.shape[0]} px"
        )
    height, width = numbers.shape
    frame = open_frame(entry.image, str(path), notes, (height, width))
    objects: list[tuple[int, Segmentation]] = []
    for value in np.unique(numbers):
        if not value:
            continue
        mask = numbers == value
        counts = np.bincount(kinds[mask])[1:]
        if not counts.any():
            raise DatasetError(f"{path}: object {value} has no class in {class_file}")
        if np.count_nonzero(counts) > 1:
            notes.add("objects of several classes; the most frequent is taken", str(path))
        rle = frame.mask(mask, str(path))
        if rle is not None:
            objects.append((int(counts.argmax()), rle))
    return Labelled(frame, objects)
