"""Which pictures of a data set belong to a split."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from training.data.formats.source import split_name
from training.data.records import DatasetError

DEFAULT_FRACTION = 0.2
FEWEST_IMAGES = 5
"""For validation, if no fraction is given and these are at most a third of the images."""
_log = logging.getLogger(__name__)
_AUGMENTED = re.compile(r"[._](jpe?g|png|bmp|webp)\.rf\.[0-9A-Za-z]+$", re.IGNORECASE)
"""What Roboflow appends to the copies of one picture."""
_NUMBER = re.compile(r"[-_. ]+\(?[a-z]{0,5}\d+\)?$", re.IGNORECASE)
_FEWEST_GROUPS = 5

Item = TypeVar("Item")


def scene_of(stem: str) -> str:
    """What the names of pictures of one scene have in common: the name without its last number."""
    plain = _AUGMENTED.sub("", stem)
    return _NUMBER.sub("", plain) or plain


def divide(
    items: Sequence[Item], stem_of: Callable[[Item], str], fraction: float | None
) -> tuple[list[Item], list[Item], str]:
    """Divides pictures into training and validation, the same way on every machine.

    Pictures whose names differ only in their last number stay together. If that leaves too few
    groups, or one that is larger than the validation set may be, only copies of one picture do.

    Args:
        items: The pictures.
        stem_of: The name of each, without suffix.
        fraction: Share for validation, 0 for none of them; None: a fifth, but not too few.

    Returns:
        Training pictures, validation pictures, and how they were divided.

    Raises:
        DatasetError: The fraction is below 0 or not below 1, or there is only one picture.
    """
    share = DEFAULT_FRACTION if fraction is None else fraction
    if not 0 <= share < 1:
        raise DatasetError(f"the validation fraction {share:g} is not between 0 and 1")
    if share == 0:
        return list(items), [], "all for training"
    if len(items) < 2:
        raise DatasetError(
            f"{len(items)} images cannot be divided into training and validation; "
            "--val-split '' trains without validation"
        )
    wanted = max(1, round(len(items) * share))
    if fraction is None:
        wanted = max(wanted, min(FEWEST_IMAGES, len(items) // 3))
    scenes = [scene_of(stem_of(item)) for item in items]
    sizes = Counter(scenes)
    how = "images whose names differ only in a number at the end, as a_1 and a_2, stay together"
    if len(sizes) < _FEWEST_GROUPS or max(sizes.values()) > max(wanted, len(items) // 5):
        scenes = [_AUGMENTED.sub("", stem_of(item)) for item in items]
        how = "each image by itself"
        sizes = Counter(scenes)
    held_back: set[str] = set()
    count = 0
    for scene in sorted(
        sizes, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    ):
        if count >= wanted:
            break
        held_back.add(scene)
        count += sizes[scene]
    train = [item for item, scene in zip(items, scenes, strict=True) if scene not in held_back]
    val = [item for item, scene in zip(items, scenes, strict=True) if scene in held_back]
    if not train:
        raise DatasetError(f"the {len(items)} images are one scene and cannot be divided")
    return train, val, how


def list_divided(given: Sequence[str], fraction: float | None) -> list[str]:
    """The splits of a data set after its division, if it needs one.

    Args:
        given: The splits in the folder; [""] if its pictures are not divided.
        fraction: As of `divide`.
    """
    if list(given) == [""]:
        return ["train"] if fraction == 0 else ["train", "val"]
    if fraction and "train" in given and "val" not in given:
        return ["train", "val", *(split for split in given if split != "train")]
    return list(given)


def divide_given(
    items: Sequence[Item],
    stem_of: Callable[[Item], str],
    given: str,
    split: str,
    fraction: float | None,
    root: Path,
) -> list[Item]:
    """The part of undivided pictures that a split stands for; the division is reported.

    Args:
        items: The pictures.
        stem_of: The name of each, without suffix.
        given: The split that they are of, "" for none.
        split: train or val, or another name for it.
        fraction: As of `divide`.
        root: The data set, for messages.

    Raises:
        DatasetError: It is another split, or they cannot be divided.
    """
    wanted = split_name(split)
    if wanted not in ("train", "val"):
        raise DatasetError(f"{root} has no split {split!r}; its images are not divided")
    try:
        train, val, how = divide(items, stem_of, fraction)
    except DatasetError as error:
        raise DatasetError(f"{root}: {error}") from error
    if wanted == "val" and not val:
        raise DatasetError(f"{root} has no split for validation, and the fraction for it is 0")
    if wanted == "train" and val:
        _log.warning(
            "%s: %d images divided into %d for training and %d for validation (%s)",
            f"{root} {given}".strip(), len(items), len(train), len(val), how,
        )  # fmt: skip
    return train if wanted == "train" else val
