"""YOLO-seg: a text file per picture, one polygon a line, coordinates as fractions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from training.data.formats.files import PICTURES, read_text, walk
from training.data.formats.frame import LabelNotes, Segmentation, number, open_frame
from training.data.formats.source import NAMES, Entry, Labelled, Source, split_of
from training.data.records import DatasetError
from training.data.report import shorten

_TEXT = frozenset((".txt",))
_OUTSIDE = 0.01
"""Fractions may be so far outside of 0..1: rounding of other programs."""


def find(root: Path) -> str | None:
    """Why the folder looks like this format."""
    yaml_file = _find_yaml(root)
    if yaml_file is not None:
        return f"{yaml_file.name} has class names"
    for path in walk(root, _TEXT):
        if "labels" in path.relative_to(root).parts[:-1]:
            return f"{path.relative_to(root)}"
    return None


def _find_yaml(root: Path) -> Path | None:
    files = [root / "data.yaml", root / "data.yml", root / "dataset.yaml"]
    files += sorted([*root.glob("*.yaml"), *root.glob("*.yml")])
    for path in files:
        if path.is_file() and "\nnames" in "\n" + path.read_bytes().decode("utf-8-sig", "replace"):
            return path
    return None


def open_source(root: Path) -> Source:
    """Lists the pictures that data.yaml names, or those of all folders called images."""
    notes = LabelNotes()
    yaml_file = _find_yaml(root)
    content: dict[str, Any] = {}
    if yaml_file is not None:
        try:
            content = yaml.safe_load(read_text(yaml_file))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            if isinstance(error, DatasetError):
                raise
            text = " ".join(str(error).split())
            raise DatasetError(f"{yaml_file} is not YAML: {text}") from error
        if not isinstance(content, dict):
            raise DatasetError(f"{yaml_file} holds {shorten(content)}, not keys and values")
    classes = _classes(content, root, yaml_file)
    entries = _entries(content, root, yaml_file)
    if not any(entry.labels.is_file() for entry in entries):
        looked = entries[0].labels if entries else root / "labels"
        raise DatasetError(f"{root} has no YOLO label files: looked for {looked}")
    images = {entry.labels.resolve() for entry in entries}
    for path in walk(root, _TEXT):
        if "labels" in path.relative_to(root).parts[:-1] and path.resolve() not in images:
            if path.name == "classes.txt":
                continue
            raise DatasetError(f"{path} has no image: looked for {_image_stem(path)}.*")
    return Source(classes, entries, lambda entry: _read(entry, classes, notes), notes)


def _classes(content: dict[str, Any], root: Path, yaml_file: Path | None) -> tuple[str, ...]:
    names = content.get("names")
    if names is None:
        for path in (root / "classes.txt", root / "labels" / "classes.txt"):
            if path.is_file():
                names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
                break
        else:
            raise DatasetError(f"{root} has no class names: looked for data.yaml and classes.txt")
    if isinstance(names, dict):
        keys = list(range(len(names)))
        if sorted(names, key=str) != sorted(keys, key=str):
            raise DatasetError(
                f"{yaml_file}: names has the keys {shorten(list(names))}, not 0, 1 .."
            )
        names = [names[key] for key in keys]
    if not isinstance(names, list) or not names:
        raise DatasetError(f"{yaml_file}: names is {shorten(names)}, not a list of classes")
    count = content.get("nc")
    if count is not None and count != len(names):
        raise DatasetError(f"{yaml_file}: nc is {shorten(count)}, there are {len(names)} names")
    return tuple(str(name) for name in names)


def _entries(content: dict[str, Any], root: Path, yaml_file: Path | None) -> list[Entry]:
    entries = []
    for split, keys in NAMES.items():
        for key in keys:
            value = content.get(key)
            if value and yaml_file is not None:
                for name in value if isinstance(value, list) else [value]:
                    for image in _images(str(name), content, root, f"{yaml_file}: {key}"):
                        entries.append(Entry(image, _labels_of(image), split))
    if entries:
        return entries
    return [
        Entry(image, _labels_of(image), split_of(image, root))
        for image in walk(root, PICTURES)
        if "images" in image.relative_to(root).parts[:-1]
    ]


def _images(name: str, content: dict[str, Any], root: Path, where: str) -> list[Path]:
    """The pictures of a folder, or of a text file that lists them."""
    below = str(content.get("path") or "")
    plain = name.removeprefix("../")  # Roboflow writes ../train/images beside train/
    candidates = [root / below / name, root / name, root / plain, root / below / plain]
    for place in candidates:
        if place.is_dir():
            inner = place / "images"
            return list(walk(inner if inner.is_dir() else place, PICTURES))
        if place.is_file():
            lines = [line.strip() for line in read_text(place).splitlines()]
            listed = [place.parent / line.removeprefix("./") for line in lines if line]
            return [image if image.is_file() else root / image.name for image in listed]
    raise DatasetError(f"{where}: {name!r} does not exist: looked for {candidates[0]}")


def _labels_of(image: Path) -> Path:
    """The label file of a picture: the last folder `images` becomes `labels`."""
    parts = list(image.with_suffix(".txt").parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts)


def _image_stem(labels: Path) -> Path:
    parts = list(labels.with_suffix("").parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "labels":
            parts[index] = "images"
            break
    return Path(*parts)


def _read(entry: Entry, classes: tuple[str, ...], notes: LabelNotes) -> Labelled:
    path = entry.labels
    frame = open_frame(entry.image, str(path), notes)
    objects: list[tuple[int, Segmentation]] = []
    if not path.is_file():
        notes.add("images without a label file taken as empty", str(entry.image))
        return Labelled(frame, objects)
    for line_number, line in enumerate(read_text(path).splitlines(), 1):
        values = line.split()
        if not values:
            continue
        where = f"{path} line {line_number}"
        label = _label(values[0], classes, where)
        if len(values) == 5:
            raise DatasetError(
                f"{where} is a box, not a polygon: {shorten(line)}; masks are needed"
            )
        if len(values) < 7 or len(values) % 2 == 0:
            raise DatasetError(
                f"{where} has {len(values)} values, not a class and at least 3 points x y"
            )
        fractions = [number(value, where) for value in values[1:]]
        for value in fractions:
            if not -_OUTSIDE <= value <= 1 + _OUTSIDE:
                raise DatasetError(f"{where}: the coordinate {value:g} is not a fraction in 0..1")
        points = [
            (x * frame.width, y * frame.height)
            for x, y in zip(fractions[::2], fractions[1::2], strict=True)
        ]
        polygon = frame.polygon(points, where)
        if polygon is not None:
            objects.append((label, [polygon]))
    return Labelled(frame, objects)


def _label(text: str, classes: tuple[str, ...], where: str) -> int:
    label = number(text, where)
    if label != int(label) or not 0 <= label < len(classes):
        raise DatasetError(
            f"{where}: the class {shorten(text)} is not in 0..{len(classes) - 1} "
            f"({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''})"
        )
    return int(label)
