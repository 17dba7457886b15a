"""Checks a data set: `CocoContent` -> records without faults, and a report of all that was found.

What is harmless is read, objects that cannot be used are skipped, and what contradicts itself
refuses the data set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.model_config import ClassSpec
from training.data.content import CocoContent
from training.data.federated import check_negatives, read_federated
from training.data.ids import read_image_id, read_whole
from training.data.records import (
    Annotation,
    DatasetError,
    FederatedLabels,
    ImageId,
    PolygonObject,
    Record,
)
from training.data.report import Kind, Problem, Report, shorten
from training.data.segmentations import has_short_part, read_object

_LONGEST_SIDE_PX = 1_000_000

Size = tuple[int, int] | str
"""Height and width of an image file as it is seen, or why it cannot be read."""
ReadSizes = Callable[[Path, Sequence[str]], list[Size]]


@dataclass
class _Image:
    id: ImageId
    file_name: str
    hw: tuple[int, int] | None
    usable: bool = True
    federated: FederatedLabels | None = None
    objects: list[Annotation | PolygonObject] = field(default_factory=list)
    crowds: list[Annotation | PolygonObject] = field(default_factory=list)


@dataclass(frozen=True)
class _Category:
    place: int
    number: int
    name: str
    parent: str


@dataclass(frozen=True)
class Checked:
    """A split that was checked; the records are those that can be used."""

    records: list[Record]
    classes: tuple[ClassSpec, ...]
    report: Report


def check_content(content: CocoContent, read_sizes: ReadSizes | None) -> Checked:
    """Checks a split.

    Args:
        content: The split.
        read_sizes: Reads the sizes of the image files in a folder; None: the files are not read.
    """
    report = Report(content.source, labelled=content.annotations is not None)
    classes = _check_categories(content, report)
    labels = {c.category_id: label for label, c in enumerate(classes)}
    images = _check_images(content.images, labels, report)
    if read_sizes is not None:
        _check_files(content.image_folder, list(images.values()), read_sizes, report)
    for image in images.values():
        if image.hw is None and image.usable:
            _refuse(image, report, Kind.IMAGE, "it has no height and width")
    _check_annotations(content, labels, images, report)
    for image in images.values():
        _check_negatives(image, labels, report)
    records = [
        Record(i.id, i.file_name, *i.hw, tuple(i.objects), tuple(i.crowds), i.federated)
        for i in images.values()
        if i.usable and i.hw is not None
    ]
    report.images = len(images)
    counts = Counter(item.label for record in records for item in record.objects)
    report.classes = {c.name: counts[label] for label, c in enumerate(classes)}
    report.objects = sum(len(record.objects) for record in records)
    report.crowds = sum(len(record.crowds) for record in records)
    return Checked(records, classes, report)


def _check_categories(content: CocoContent, report: Report) -> tuple[ClassSpec, ...]:
    """The classes in the order of their ids, without those that are refused or skipped."""
    found: dict[int, _Category] = {}
    if not isinstance(content.categories, list) or not content.categories:
        report.add(Kind.CATEGORY, "categories", f"the list is {shorten(content.categories)}")
        return ()
    for place, category in enumerate(content.categories):
        where = f"categories[{place}]"
        fields = category if isinstance(category, dict) else {}
        number, name = read_whole(fields.get("id")), fields.get("name")
        if number is None or number < 0 or not isinstance(name, str) or not name.strip():
            report.add(Kind.CATEGORY, where, f"it has no valid id and name: {shorten(category)}")
        elif number in found:
            names = f"{shorten(found[number].name)} and {shorten(name)}"
            report.add(Kind.CATEGORY_TWICE, where, f"two categories have the id {number}: {names}")
        else:
            parent = fields.get("supercategory")
            parent = parent if isinstance(parent, str) and parent != "none" else ""
            found[number] = _Category(place, number, name, parent)
            if not isinstance(fields["id"], int):
                report.add(Kind.TEXT_ID, where, shorten(fields["id"]))
    _check_names(found, content, report)
    return tuple(ClassSpec(category_id=i, name=found[i].name) for i in sorted(found))


def _check_names(found: dict[int, _Category], content: CocoContent, report: Report) -> None:
    """Removes categories that have no objects and the name of another, or that only group others.

    Roboflow lists the name of a data set as category 0, which has no objects and is the
    supercategory of the classes; one of these may have the same name.
    """
    same_name: dict[str, list[_Category]] = {}
    for category in found.values():
        same_name.setdefault(category.name, []).append(category)
    parents = {category.parent for category in found.values()}
    groups = [c for c in found.values() if c.name in parents and not c.parent]
    repeated = [same for same in same_name.values() if len(same) > 1]
    if not groups and not repeated:
        return
    used = Counter(
        read_whole(annotation.get("category_id"))
        for annotation in content.annotations or ()
        if isinstance(annotation, dict)
    )
    dropped = {c.number: c for c in groups if not used[c.number]}
    for same in repeated:
        kept = [c for c in same if used[c.number]]
        kept = kept or [c for c in same if c not in groups][:1] or same[:1]
        dropped |= {c.number: c for c in same if c not in kept}
        if len(kept) > 1:
            first, second = kept[:2]
            message = (
                f"two categories are called {shorten(first.name)}: the ids {first.number} "
                f"({used[first.number]} annotations) and {second.number} ({used[second.number]}); "
                "give them different names, or one id"
            )
            report.add(Kind.CATEGORY_TWICE, f"categories[{second.place}]", message)
    for number, category in dropped.items():
        del found[number]
        message = f"id {number}, {shorten(category.name)}"
        report.add(Kind.CATEGORY_UNUSED, f"categories[{category.place}]", message)


def _check_images(images: Any, labels: dict[int, int], report: Report) -> dict[ImageId, _Image]:
    """The images by id; those without an id are refused."""
    found: dict[ImageId, _Image] = {}
    categories_are_whole = not report.count("refused")
    if not isinstance(images, list):
        report.add(Kind.IMAGE, "images", f"expected a list, got {shorten(images)}")
        return found
    for place, entry in enumerate(images):
        where = f"images[{place}]"
        fields = entry if isinstance(entry, dict) else {}
        image_id, name = read_image_id(fields.get("id")), fields.get("file_name")
        if image_id is None or not isinstance(name, str) or not name:
            message = f"it has no valid id and file_name: {shorten(entry)}"
            if "coco_url" in fields and name is None:
                message += f"; its coco_url {shorten(fields['coco_url'])} does not name a file"
            report.add(Kind.IMAGE, where, message)
            continue
        if image_id in found:
            names = f"{shorten(found[image_id].file_name)} and {shorten(name)}"
            message = f"two images have the id {shorten(image_id)}: {names}"
            report.add(Kind.IMAGE_TWICE, where, message)
            continue
        if isinstance(fields["id"], (str, float)):
            report.add(Kind.TEXT_ID, where, shorten(fields["id"]))
        found[image_id] = image = _Image(image_id, name, None)
        stated = [fields.get("height"), fields.get("width")]
        sides = [read_whole(side) for side in stated]
        if all(side is not None and 0 < side <= _LONGEST_SIDE_PX for side in sides):
            image.hw = (sides[0] or 0, sides[1] or 0)
        elif any(stated):
            message = f"height and width are {shorten(stated[0])} and {shorten(stated[1])}"
            _refuse(image, report, Kind.IMAGE, message)
        try:
            image.federated = read_federated(fields, labels) if categories_are_whole else None
        except Problem as problem:
            _refuse(image, report, problem.kind, str(problem))
    return found


def _check_negatives(image: _Image, labels: dict[int, int], report: Report) -> None:
    try:
        check_negatives(image.federated, {o.label for o in (*image.objects, *image.crowds)}, labels)
    except Problem as problem:
        _refuse(image, report, problem.kind, str(problem))


def _refuse(image: _Image, report: Report, kind: Kind, message: str) -> None:
    image.usable = False
    report.add(kind, f"image {shorten(image.id)} ({shorten(image.file_name)})", message)


def _check_files(folder: Path, images: list[_Image], read: ReadSizes, report: Report) -> None:
    for image, size in zip(images, read(folder, [i.file_name for i in images]), strict=True):
        if not image.usable:
            continue
        if isinstance(size, str):
            _refuse(image, report, Kind.FILE, size)
        elif image.hw is None:
            image.hw = size
            report.add(Kind.NO_SIZE, f"image {shorten(image.id)} ({shorten(image.file_name)})")
        elif image.hw != size:
            _refuse(
                image,
                report,
                Kind.FILE_SIZE,
                f"the file is {size[1]}x{size[0]} px, its annotation says "
                f"{image.hw[1]}x{image.hw[0]}",
            )


def _check_annotations(
    content: CocoContent,
    labels: dict[int, int],
    images: dict[ImageId, _Image],
    report: Report,
) -> None:
    seen: set[Any] = set()
    lists_are_whole = not report.count("refused")
    annotations: Iterable[Any] = content.annotations or ()
    for place, annotation in enumerate(annotations):
        if not isinstance(annotation, dict):
            report.add(Kind.ANNOTATION, f"annotations[{place}]", f"it is {shorten(annotation)}")
            continue
        number, image = annotation.get("id"), None
        try:
            image = _find_image(annotation, images)
            where = partial(_describe, place, number, image)
            label = _find_label(annotation, labels)
            crowd = _read_crowd(annotation)
            if not image.usable or image.hw is None:
                continue
            area = _read_area(annotation.get("area"))
            item = read_object(annotation.get("segmentation"), label, area, image.hw)
        except Problem as problem:
            if lists_are_whole or problem.kind is not Kind.REFERENCE:
                report.add(problem.kind, partial(_describe, place, number, image), str(problem))
            continue
        (image.crowds if crowd else image.objects).append(item)
        if not isinstance(number, (int, str)) or not number or number in seen:
            report.add(Kind.ANNOTATION_ID, where)
        else:
            seen.add(number)
        if "iscrowd" not in annotation:
            report.add(Kind.NO_CROWD_FLAG, where)
        if area is None:
            report.add(Kind.NO_AREA, where)
        if has_short_part(annotation["segmentation"]):
            report.add(Kind.PART, where, shorten(annotation["segmentation"]))


def _describe(place: int, number: Any, image: _Image | None) -> str:
    """Where an annotation is."""
    where = f"annotations[{place}]" if number is None else f"annotation {shorten(number)}"
    if image is None:
        return where
    return f"{where} of image {shorten(image.id)} ({shorten(image.file_name)})"


def _find_image(annotation: dict[str, Any], images: dict[ImageId, _Image]) -> _Image:
    image_id = read_image_id(annotation.get("image_id"))
    if image_id is None or image_id not in images:
        value, category = annotation.get("image_id"), annotation.get("category_id")
        raise Problem(
            Kind.REFERENCE,
            f"it names image {shorten(value)} and category {shorten(category)}; "
            "the image is not listed",
        )
    return images[image_id]


def _find_label(annotation: dict[str, Any], labels: dict[int, int]) -> int:
    category_id = read_whole(annotation.get("category_id"))
    if category_id is None or category_id not in labels:
        value = annotation.get("category_id")
        raise Problem(
            Kind.REFERENCE,
            f"it names image {shorten(annotation['image_id'])} and category {shorten(value)}; "
            "the category is not listed",
        )
    return labels[category_id]


def _read_crowd(annotation: dict[str, Any]) -> bool:
    value = annotation.get("iscrowd")
    if value in (None, 0, "0", ""):
        return False
    if value in (1, "1"):
        return True
    raise Problem(Kind.ANNOTATION, f"iscrowd is {shorten(value)}, expected 0 or 1")


def _read_area(value: Any) -> float | None:
    """The stated area; None if it is no number from 0."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return float(value) if 0 <= value < np.inf and value < 2**62 else None


def check_classes(split: Checked, known: tuple[ClassSpec, ...], whose: str) -> None:
    """Refuses a split whose objects are of other classes than those of a model or of another split.

    Args:
        split: The split.
        known: The classes of the model or the other split.
        whose: What has them, for the message.

    Raises:
        DatasetError: An id has another name there, or a class with objects is not there.
    """
    names = {c.category_id: c.name for c in known}
    used = Counter(o.label for r in split.records for o in r.objects)
    for label, found in enumerate(split.classes):
        name = names.get(found.category_id)
        if name == found.name or (name is None and not used[label]):
            continue
        there = f"calls it {name!r}" if name is not None else "has no such id"
        raise DatasetError(
            f"{split.report.source}: category {found.category_id} is {found.name!r}, {whose} "
            f"{there}; ids and names must be the same"
        )
