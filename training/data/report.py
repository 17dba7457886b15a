"""What the check of a data set found: where, how often, and what was done."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

Action = Literal["refused", "skipped", "read"]
ACTIONS: tuple[Action, ...] = ("refused", "skipped", "read")
_EXAMPLES = 3
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60


class Kind(Enum):
    """A kind of finding: what is done, and what is found (after its number)."""

    CATEGORY = "refused", "categories without a valid id and name"
    CATEGORY_TWICE = "refused", "categories with the id or the name of another"
    IMAGE = "refused", "images without a valid id, file name or size"
    IMAGE_TWICE = "refused", "images with the id of another"
    FILE = "refused", "image files that are missing or cannot be read"
    FILE_SIZE = "refused", "image files of another size than the annotations say"
    ANNOTATION = "refused", "annotations with a field that is missing or of a wrong type"
    LABELLED_CLASSES = "refused", "images whose labelled classes (as in LVIS) are not valid"
    REFERENCE = "refused", "annotations of an image or a category that is not listed"
    SEGMENTATION = "refused", "segmentations that are neither polygons nor RLE"
    COORDINATE = "refused", "polygons with a coordinate that is no number or far from the image"
    RLE = "refused", "RLE that do not fill their image"
    CATEGORY_UNUSED = "skipped", "categories without objects that repeat or only group others"
    NO_SEGMENTATION = "skipped", "objects without a segmentation"
    FEW_POINTS = "skipped", "objects without a polygon of three points"
    OUTSIDE = "skipped", "objects outside their image"
    NO_PIXELS = "skipped", "objects whose mask has no pixel"
    PART = "skipped", "parts of objects, polygons of less than three points"
    TEXT_ID = "read", "ids that are text or have a decimal point"
    ANNOTATION_ID = "read", "annotations whose id is missing, 0 or used before"
    NO_CROWD_FLAG = "read", "annotations without iscrowd; they are objects"
    NO_AREA = "read", "annotations without a valid area; it is that of the mask"
    NO_SIZE = "read", "images without a size; it is that of the file"

    @property
    def action(self) -> Action:
        """What is done."""
        action: Action = self.value[0]
        return action


class Problem(ValueError):
    """A part of a data set is refused or skipped; the message has the value."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class _Group:
    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Report:
    """The findings of one split.

    Attributes:
        source: The file or the folder.
        images, objects, crowds: What can be used.
        classes: Number of objects by the name of their class, for every class.
        labelled: Whether the split has annotations.
    """

    source: str
    images: int = 0
    objects: int = 0
    crowds: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    labelled: bool = True
    _groups: dict[Kind, _Group] = field(default_factory=dict)

    def add(self, kind: Kind, where: str | Callable[[], str], message: str = "") -> None:
        """Counts a finding; the first ones of a kind are kept, and `where` is called for these."""
        group = self._groups.setdefault(kind, _Group())
        group.count += 1
        if len(group.examples) < _EXAMPLES:
            place = where if isinstance(where, str) else where()
            group.examples.append(f"{place}: {message}" if message else place)

    def count(self, what: Action | Kind) -> int:
        """Number of findings of a kind or of all kinds of an action."""
        return sum(
            group.count for kind, group in self._groups.items() if what in (kind, kind.action)
        )

    @property
    def refusal(self) -> str | None:
        """One line that names the first fault; None if the split can be used."""
        refused = [g for k, g in self._groups.items() if k.action == "refused"]
        if not refused:
            return None
        more = self.count("refused") - 1
        rest = f" (and {more} more: solo-data check lists them)" if more else ""
        return f"{self.source}: {refused[0].examples[0]}{rest}"

    def warnings(self) -> list[str]:
        """One line for each kind of what is skipped, and one if there is nothing to learn."""
        lines = [f"{self.source}: {line}" for line in self._lines("skipped")]
        if self.labelled and not self.objects and not self.count("refused"):
            lines.append(f"{self.source}: no image has an object")
        return lines + [f"{self.source}: {line}" for line in self._look_alikes()]

    def _look_alikes(self) -> list[str]:
        """One line for each group of classes that may be one, written in different ways."""
        groups: dict[str, list[str]] = {}
        for name in self.classes:
            groups.setdefault(" ".join(name.split()).casefold(), []).append(name)
        return [
            f"classes that differ only in case or spaces: {', '.join(map(repr, names))}"
            for names in groups.values()
            if len(names) > 1
        ]

    def text(self) -> str:
        """All findings, for people."""
        counts = [f"{name} {count}" for name, count in self.classes.items()]
        names = ", ".join(counts[:10]) + (", ..." if len(counts) > 10 else "")
        head = (
            f"{self.source}: {self.images} images, {self.objects} objects, {self.crowds} crowds, "
            f"{len(self.classes)} classes ({names})"
        )
        lines = [line for action in ACTIONS for line in self._lines(action)]
        if self.labelled and not self.objects:
            lines.append("warning: no image has an object")
        lines += [f"warning: {line}" for line in self._look_alikes()]
        return "\n  ".join([head, *lines])

    def _lines(self, action: Action) -> list[str]:
        lines = []
        for kind, group in self._groups.items():
            if kind.action == action:
                rest = "; ..." if group.count > len(group.examples) else ""
                examples = "; ".join(group.examples) + rest
                lines.append(f"{action} {group.count} {kind.value[1]}: {examples}")
        return lines


def shorten(value: Any) -> str:
    """A value of a file, on one line, however long it is."""
    return _REPR.repr(value)
