"""Image ids of the results: numbers, or those of a COCO file."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from service.errors import StartupError
from service.jobs.errors import ImageUnusable
from service.jobs.files import ImageFile
from service.jobs.listing import Listing

_MOST_NAMED = 3
_LARGEST = 2**63 - 1

KnownIds = Mapping[str, int | None]
"""Image ids by normalised file name; None for a name that has several."""


def _normalise(name: str) -> str:
    """A path for comparisons: composed characters, without `./` and doubled slashes."""
    return PurePosixPath(unicodedata.normalize("NFC", name)).as_posix()


def read_image_ids(annotations: Path) -> KnownIds:
    """The image ids of a COCO file.

    Raises:
        StartupError: It cannot be read or has no list of images with ids.
    """
    known: dict[str, int | None] = {}
    try:
        for image in json.loads(annotations.read_bytes())["images"]:
            name, image_id = _normalise(str(image["file_name"])), _read_id(image["id"])
            known[name] = image_id if known.get(name, image_id) == image_id else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise StartupError(f"{annotations}: not a COCO file with images: {error!r}") from error
    return known


def _read_id(value: Any) -> int:
    image_id = int(value)
    if abs(image_id) > _LARGEST or (isinstance(value, float) and value != image_id):
        raise ValueError(f"the image id {value} is not a whole number of 64 bits")
    return image_id


def find_image_id(address: str, known: KnownIds) -> int:
    """The id of the longest end of a path that is a file name in `known`.

    Raises:
        ImageUnusable: No end of it is, or the annotations give the name several ids.
    """
    end = _normalise(address)
    while end not in known:
        _, slash, end = end.partition("/")
        if not slash:
            raise ImageUnusable("it is not in the annotations")
    image_id = known[end]
    if image_id is None:
        raise ImageUnusable(f"ambiguous: the annotations have several ids for {end!r}")
    return image_id


def assign_ids(listing: Listing, known: KnownIds | None) -> list[int | ImageUnusable]:
    """Each file's image id, or why it has none.

    Args:
        listing: The files.
        known: The ids; None: they are 1, 2, 3 ...
    """
    if known is None:
        return list(range(1, len(listing) + 1))
    ids: list[int | ImageUnusable] = []
    owner: dict[int, int] = {}
    shared: dict[int, list[int]] = {}
    for index, file in enumerate(listing.files):
        try:
            image_id = find_image_id(file.address, known)
        except ImageUnusable as error:
            ids.append(error)
            continue
        ids.append(image_id)
        if owner.setdefault(image_id, index) != index:
            shared.setdefault(image_id, [owner[image_id]]).append(index)
    for image_id, indices in shared.items():
        for index in _find_unsure(listing, indices, image_id, known):
            others = [listing.files[other] for other in indices if other != index]
            ids[index] = _describe_ambiguity(image_id, others)
    return ids


def _find_unsure(
    listing: Listing, indices: Sequence[int], image_id: int, known: KnownIds
) -> Sequence[int]:
    """The files that do not get an id that several have found.

    A file gets it whose whole path below the input is the name in the annotations.
    """
    exact = [
        index
        for index in indices
        if known.get(_normalise(listing.name_of(listing.files[index]))) == image_id
    ]
    return [index for index in indices if exact != [index]]


def _describe_ambiguity(image_id: int, others: Sequence[ImageFile]) -> ImageUnusable:
    named = ", ".join(str(file) for file in others[:_MOST_NAMED])
    more = f" and {len(others) - _MOST_NAMED} more" if len(others) > _MOST_NAMED else ""
    return ImageUnusable(
        f"ambiguous: the annotations give its image id {image_id} to {named}{more}"
    )
