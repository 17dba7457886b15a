"""Writes several data sets as one, in which what a set does not label is not taken as absent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from training.data.content import CocoContent
from training.data.federated import NEGATIVES, NOT_EXHAUSTIVE, read_federated
from training.data.formats import list_splits, open_dataset
from training.data.formats.convert import copy_images, name_copies, write_content
from training.data.formats.splits import list_divided
from training.data.headers import read_sizes
from training.data.ids import read_image_id, read_whole
from training.data.records import DatasetError, FederatedLabels
from training.data.validate import check_content


@dataclass
class _Joined:
    """One split of the new data set while it grows."""

    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)


def join(
    folders: Sequence[Path],
    to: Path,
    *,
    format: str | None = None,
    val_fraction: float | None = None,
) -> list[str]:
    """Writes COCO JSON with copies of the images; returns a line for each file.

    Classes of the same name are one class. An image gets `neg_category_ids` with the classes that
    its own data set labels and it has no object of, unless its data set has all classes.

    Args:
        folders: The data sets; those without splits are divided into train and val.
        to: A new folder.
        format: Format of the labels; by default it is found for each.
        val_fraction: As of `open_dataset`.

    Raises:
        DatasetError: A data set cannot be read or is refused, or the target exists.
    """
    if to.exists() and (to.is_file() or any(to.iterdir())):
        raise DatasetError(f"{to} exists")
    sets = [_open_splits(folder, format, val_fraction) for folder in folders]
    ids: dict[str, int] = {}  # of the new categories by name
    for contents in sets:
        for content in contents.values():
            for category in content.categories:
                ids.setdefault(category["name"], len(ids) + 1)
    joined: dict[str, _Joined] = defaultdict(_Joined)
    copied: dict[str, Path] = {}
    for number, (folder, contents) in enumerate(zip(folders, sets, strict=True), 1):
        for split, content in contents.items():
            names = {
                name: f"{number}_{folder.resolve().name}/{target}"
                for name, target in name_copies(content, folder).items()
            }
            copy_images(content, names, to, copied)
            _add(joined[split], content, names, ids)
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    lines = []
    for split, parts in joined.items():
        content = CocoContent("", to / "images", parts.images, categories, parts.annotations)
        same = {image["file_name"]: image["file_name"] for image in parts.images}
        lines.append(write_content(content, same, to / "annotations" / f"{split}.json"))
    return lines


def _open_splits(
    folder: Path, format: str | None, val_fraction: float | None
) -> dict[str, CocoContent]:
    """The labelled splits of a checked data set, without the categories that were skipped."""
    contents = {}
    for split in list_divided(list_splits(folder, format), val_fraction):
        content = open_dataset(folder, split, format, val_fraction)
        if content.annotations is None:
            continue
        content = replace(content, annotations=list(content.annotations))
        checked = check_content(content, read_sizes)
        if checked.report.refusal:
            raise DatasetError(checked.report.refusal)
        classes = [{"id": c.category_id, "name": c.name} for c in checked.classes]
        contents[split] = replace(content, categories=classes)
    if not contents:
        raise DatasetError(f"{folder} has no annotations")
    return contents


def _add(joined: _Joined, content: CocoContent, names: dict[str, str], ids: dict[str, int]) -> None:
    """Appends the images and objects of a checked split."""
    new_ids = {c["id"]: ids[c["name"]] for c in content.categories}
    present: dict[Any, set[int]] = defaultdict(set)
    image_ids = {
        read_image_id(image["id"]): len(joined.images) + n
        for n, image in enumerate(content.images, 1)
    }
    for annotation in content.annotations or ():
        old = read_image_id(annotation["image_id"])
        own_id = read_whole(annotation["category_id"])
        assert own_id is not None  # the split is checked
        category_id = new_ids[own_id]
        present[old].add(category_id)
        joined.annotations.append(
            {
                **annotation,
                "id": len(joined.annotations) + 1,
                "image_id": image_ids[old],
                "category_id": category_id,
            }
        )
    for image in content.images:
        old = read_image_id(image["id"])
        fields = _label_fields(image, new_ids, present[old], set(ids.values()))
        entry = {**image, "id": image_ids[old], "file_name": names[image["file_name"]], **fields}
        joined.images.append(entry)


def _label_fields(
    image: dict[str, Any], new_ids: dict[int, int], present: set[int], every: Collection[int]
) -> dict[str, list[int]]:
    """The federated fields of an image in the new categories."""
    labelled = read_federated(image, new_ids) or FederatedLabels()
    negatives, own = labelled.negatives, frozenset(new_ids.values())
    if negatives is None and own != set(every):
        negatives = own - present - labelled.not_exhaustive
    fields = {} if negatives is None else {NEGATIVES: sorted(negatives)}
    if labelled.not_exhaustive:
        fields[NOT_EXHAUSTIVE] = sorted(labelled.not_exhaustive)
    return fields
