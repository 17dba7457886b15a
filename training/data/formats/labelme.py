"""LabelMe: one JSON file per picture."""

from __future__ import annotations

import base64
import binascii
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.data.formats.files import PICTURES, read_json, read_start, walk
from training.data.formats.frame import Frame, LabelNotes, Polygon, number, open_frame
from training.data.formats.source import Entry, Labelled, Source, split_of
from training.data.records import DatasetError
from training.data.report import shorten

_WITHOUT_AREA = ("point", "points", "line", "linestrip")
_JSON = frozenset((".json",))
_PROBED = 5


def find(root: Path) -> str | None:
    """Why the folder looks like this format."""
    for path, _ in zip(walk(root, _JSON), range(_PROBED), strict=False):
        if b'"shapes"' in read_start(path):
            return f"{path.relative_to(root)} has 'shapes'"
    return None


def open_source(root: Path) -> Source:
    """Reads all JSON files; the classes are the labels in them, sorted."""
    notes = LabelNotes()
    entries = [_entry(path, root) for path in walk(root, _JSON)]
    names = sorted(
        {
            _label(shape, _where(e.labels, i))
            for e in entries
            for i, shape in enumerate(e.content["shapes"])
            if isinstance(shape, dict) and shape.get("shape_type") not in _WITHOUT_AREA
        }
    )
    labels = {name: label for label, name in enumerate(names)}
    used = {entry.image.resolve() for entry in entries}
    for picture in walk(root, PICTURES):
        if picture.resolve() not in used:
            notes.add("images without a JSON file left out", str(picture))
    return Source(tuple(names), entries, lambda entry: _read(entry, labels, notes), notes)


def _where(path: Path, index: int) -> str:
    return f"{path}: shapes[{index}]"


def _entry(path: Path, root: Path) -> Entry:
    content = read_json(path)
    if not isinstance(content.get("shapes"), list):
        raise DatasetError(f"{path} is not LabelMe JSON: it has no list 'shapes'")
    embedded = content.pop("imageData", None)
    image = _find_image(path, content.get("imagePath"))
    if image is None:
        raise DatasetError(
            f"{path}: its image {content.get('imagePath')!r} does not exist"
            + (
                "; it is embedded: solo-data convert --extract-images writes it beside the file"
                if embedded
                else ""
            )
        )
    return Entry(image, path, split_of(path, root), content)


def _find_image(path: Path, name: Any) -> Path | None:
    """The image that a JSON file names, also with the separators of Windows, or that beside it."""
    candidates = []
    if isinstance(name, str) and name and "\0" not in name:
        portable = name.replace("\\", "/")
        candidates = [path.parent / portable, path.parent / portable.rsplit("/", 1)[-1]]
    candidates += [
        path.with_suffix(s) for suffix in sorted(PICTURES) for s in (suffix, suffix.upper())
    ]
    for candidate in candidates:
        try:
            if candidate.is_file():
                return candidate
        except OSError:  # a name that is too long
            continue
    return None


def extract_images(root: Path) -> int:
    """Writes the embedded images of JSON files whose image file is missing; returns their number.

    Raises:
        DatasetError: `imageData` is not base64.
    """
    written = 0
    for path in walk(root, _JSON):
        content = read_json(path)
        data = content.get("imageData")
        if not isinstance(data, str) or _find_image(path, content.get("imagePath")):
            continue
        name = str(content.get("imagePath") or "").replace("\\", "/").rsplit("/", 1)[-1]
        suffix = Path(name).suffix.lower()
        target = path.with_suffix(suffix if suffix in PICTURES else ".png")
        target.write_bytes(_decode_base64(data, f"{path}: imageData"))
        written += 1
    return written


def _decode_base64(text: Any, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise DatasetError(f"{where}: {shorten(text)} is not base64") from error


def _label(shape: Any, where: str) -> str:
    label = shape.get("label") if isinstance(shape, dict) else None
    if not isinstance(label, str) or not label.strip():
        raise DatasetError(f"{where}: the label {shorten(label)} is not a name")
    return label


def _read(entry: Entry, labels: dict[str, int], notes: LabelNotes) -> Labelled:
    content, path = entry.content, entry.labels
    height, width = content.get("imageHeight"), content.get("imageWidth")
    stated = None
    if (height, width) != (None, None):
        size = f"{path}: imageHeight and imageWidth"
        stated = int(number(height, size)), int(number(width, size))
    frame = open_frame(entry.image, str(path), notes, stated)
    objects: dict[Any, tuple[int, list[Polygon | dict[str, Any]]]] = {}
    for index, shape in enumerate(content["shapes"]):
        where = _where(path, index)
        if not isinstance(shape, dict):
            raise DatasetError(f"{where}: {shorten(shape)} is not a shape")
        if shape.get("shape_type") in _WITHOUT_AREA:
            notes.add(f"shapes of type {shape['shape_type']!r}, without area, left out", where)
            continue
        name, group = _label(shape, where), shape.get("group_id")
        part = _part(shape, frame, where)
        if part is not None:
            key = (index, None) if group is None else (name, str(group))
            objects.setdefault(key, (labels[name], []))[1].append(part)
    return Labelled(frame, [(label, frame.join(parts)) for label, parts in objects.values()])


def _part(shape: dict[str, Any], frame: Frame, where: str) -> Polygon | dict[str, Any] | None:
    """One shape -> a polygon or RLE."""
    kind, points = shape.get("shape_type") or "polygon", shape.get("points")
    if not isinstance(points, list):
        raise DatasetError(f"{where}: {shorten(points)} is not a list of points")
    if kind == "polygon":
        return frame.polygon(points, where)
    if kind == "rectangle":
        return frame.box(points, where)
    if kind == "circle":
        if len(points) != 2:
            raise DatasetError(f"{where}: a circle has {len(points)} points, not 2")
        centre, on = (frame.point(point, where) for point in points)
        radius = math.dist(centre, on)
        return frame.ellipse(centre, (radius, radius), where)
    if kind == "mask":
        crop = _decode_mask(shape.get("mask"), where)
        if not points:
            raise DatasetError(f"{where}: a mask has no box")
        x, y = (round(value) for value in frame.point(points[0], where))
        return frame.crop_mask(crop, x, y, where)
    raise DatasetError(f"{where}: the shape type {shorten(kind)} is not known")


def _decode_mask(text: Any, where: str) -> NDArray[Any]:
    data = _decode_base64(text, f"{where}: mask")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("L"))
    except Exception as error:  # Pillow raises what its decoders raise
        raise DatasetError(f"{where}: the mask cannot be decoded: {error}") from error
