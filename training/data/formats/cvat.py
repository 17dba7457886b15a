"""CVAT for images 1.1: one XML file for many pictures."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.data.formats.files import read_start, walk
from training.data.formats.frame import Frame, LabelNotes, Polygon, number, open_frame
from training.data.formats.source import Entry, Labelled, Source, split_name, split_of
from training.data.records import DatasetError

_XML = frozenset((".xml",))
_WITHOUT_AREA = ("polyline", "points", "cuboid", "skeleton")
_PROBED = 5


def find(root: Path) -> str | None:
    """Why the folder looks like this format."""
    for path, _ in zip(walk(root, _XML), range(_PROBED), strict=False):
        if b"<annotations" in read_start(path, 4096):
            return f"{path.relative_to(root)} has <annotations>"
    return None


def open_source(root: Path) -> Source:
    """Reads all XML files; the classes are the labels of the tasks, in their order."""
    notes = LabelNotes()
    entries: list[Entry] = []
    names: dict[str, int] = {}
    used: dict[str, str] = {}
    for path in walk(root, _XML):
        if b"<annotations" not in read_start(path, 4096):
            continue
        tree = _parse(path)
        for label in tree.findall("./meta//labels/label/name"):
            names.setdefault((label.text or "").strip(), len(names))
        for image in tree.findall("image"):
            entries.append(_entry(image, path, root))
            for shape in image:
                used.setdefault(shape.get("label", ""), f"{path} image {image.get('name')!r}")
    if not names:
        names = {name: i for i, name in enumerate(sorted(used))}
    for name, where in used.items():
        if name not in names or not name:
            raise DatasetError(f"{where}: the label {name!r} is not listed in <meta>")
    return Source(tuple(names), entries, lambda entry: _read(entry, names, notes), notes)


def _parse(path: Path) -> ET.Element:
    try:
        tree = ET.parse(path).getroot()
    except (ET.ParseError, ValueError, LookupError, OSError) as error:
        raise DatasetError(f"{path} is not XML: {error}") from error
    if tree.find("track") is not None:
        raise DatasetError(f"{path} has <track>, CVAT for video; export it as CVAT for images 1.1")
    return tree


def _entry(image: ET.Element, path: Path, root: Path) -> Entry:
    name = image.get("name")
    if not name:
        raise DatasetError(f"{path}: image {image.get('id')!r} has no name")
    portable, subset = name.replace("\\", "/"), image.get("subset", "")
    folders = [path.parent / "images", path.parent, root / "images", root]
    candidates = [folder / subset / portable for folder in folders]
    candidates += [folder / portable for folder in folders]
    found = next((file for file in candidates if file.is_file()), candidates[-2])
    split = split_name(subset) or split_name(path.stem) or split_of(path, root)
    return Entry(found, path, split or split_of(found, root), image)


def _read(entry: Entry, names: dict[str, int], notes: LabelNotes) -> Labelled:
    image = entry.content
    where = f"{entry.labels} image {image.get('name')!r}"
    size = [int(number(image.get(side), f"{where} {side}")) for side in ("height", "width")]
    frame = open_frame(entry.image, where, notes, (size[0], size[1]))
    objects: dict[Any, tuple[int, list[Polygon | dict[str, Any]]]] = {}
    for index, shape in enumerate(image):
        place = f"{where} <{shape.tag}> {index}"
        if shape.tag == "tag":
            continue
        if shape.tag in _WITHOUT_AREA:
            notes.add(f"<{shape.tag}> without area left out", place)
            continue
        part = _part(shape, frame, place)
        if part is not None:
            name, group = shape.get("label", ""), shape.get("group_id") or "0"
            key = (index, None) if group == "0" else (name, group)
            objects.setdefault(key, (names[name], []))[1].append(part)
    return Labelled(frame, [(label, frame.join(parts)) for label, parts in objects.values()])


def _part(shape: ET.Element, frame: Frame, where: str) -> Polygon | dict[str, Any] | None:
    """One shape -> a polygon or RLE."""

    def read(name: str) -> float:
        return number(shape.get(name), f"{where} {name}")

    angle = number(shape.get("rotation", "0"), f"{where} rotation")
    if shape.tag == "polygon":
        pairs = [pair.split(",") for pair in (shape.get("points") or "").split(";") if pair]
        return frame.polygon(pairs, where)
    if shape.tag == "box":
        corners = [(read("xtl"), read("ytl")), (read("xbr"), read("ybr"))]
        return frame.box(corners, where, angle)
    if shape.tag == "ellipse":
        return frame.ellipse((read("cx"), read("cy")), (read("rx"), read("ry")), where, angle)
    if shape.tag == "mask":
        left, top, width, height = (int(read(n)) for n in ("left", "top", "width", "height"))
        if not (0 < width <= frame.width and 0 < height <= frame.height):
            raise DatasetError(
                f"{where}: a mask of {width}x{height} px does not fit into the image"
            )
        return frame.crop_mask(_decode_rle(shape, height, width, where), left, top, where)
    raise DatasetError(f"{where}: the shape is not known")


def _decode_rle(shape: ET.Element, height: int, width: int, where: str) -> NDArray[Any]:
    """Run lengths along rows, the first of background -> [height, width]."""
    texts = (shape.get("rle") or "").replace(",", " ").split()
    counts = [number(text, f"{where} rle") for text in texts]
    bad = [count for count in counts if count < 0 or count != int(count)]
    if bad or sum(counts) != height * width:
        what = f"has the count {bad[0]:g}" if bad else f"gives {sum(counts):g} pixels"
        raise DatasetError(f"{where}: rle {what}, the mask is {width}x{height} px")
    pixels = np.zeros(height * width, np.uint8)
    ends = np.cumsum([int(count) for count in counts])
    for start, stop in list(pairwise([0, *ends.tolist()]))[1::2]:
        pixels[start:stop] = 1
    return pixels.reshape(height, width)
