"""What a reader of a format gives: the pictures, not yet read, and the classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.data.formats.frame import Frame, LabelNotes, Segmentation

NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""Names of folders, lists and keys that stand for a split."""


@dataclass(frozen=True)
class Labelled:
    """One picture and its objects: contiguous label and segmentation, in the picture's frame."""

    frame: Frame
    objects: list[tuple[int, Segmentation]]


@dataclass(frozen=True)
class Entry:
    """One picture that is listed but not yet read.

    Attributes:
        image: The image file.
        labels: The file of the labels; names the picture in errors.
        split: Its given split, "" for none.
        content: What the reader keeps for itself.
    """

    image: Path
    labels: Path
    split: str
    content: Any = None


@dataclass(frozen=True)
class Source:
    """A data set in one format.

    Attributes:
        classes: Their names, by label.
        entries: The pictures of all splits.
        read: Reads one picture and its labels.
        notes: What was left out or changed; `read` adds to it.
    """

    classes: tuple[str, ...]
    entries: list[Entry]
    read: Callable[[Entry], Labelled]
    notes: LabelNotes = field(default_factory=LabelNotes)


def split_name(text: str) -> str:
    """The split that a name stands for, "" if none."""
    name = text.lower()
    return next((split for split, names in NAMES.items() if name in names), "")


def split_of(path: Path, root: Path) -> str:
    """The split that a folder between root and path stands for, "" if none."""
    try:
        folders = path.relative_to(root).parts[:-1]
    except ValueError:
        return ""
    return next((split for folder in folders if (split := split_name(folder))), "")
