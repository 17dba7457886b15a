"""The files of a run, what was left out, and the names of the files in the results."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import takewhile

from service.jobs.files import ImageFile, as_line

MOST_NAMED = 100
"""Entries that are named for each reason to leave them out; the others are counted."""


@dataclass
class Listing:
    """The files of a run, in the order of the inputs, and of the paths in each of them.

    Attributes:
        files: The files.
        unreadable: Folders, and entries of lists, that cannot be read, with the reason.
    """

    files: list[ImageFile] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    _counts: Counter[str] = field(default_factory=Counter)
    _named: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    _common: list[str] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def leave_out(self, name: str, reason: str) -> None:
        """Counts an entry that is not an image of the run."""
        self._counts[reason] += 1
        if self._counts[reason] <= MOST_NAMED:
            self._named[reason].append(name)

    @property
    def left_out(self) -> int:
        """Number of entries that were left out."""
        return self._counts.total()

    def describe_left_out(self) -> list[str]:
        """The entries that were left out, each in a line, with their reasons."""
        lines = []
        for reason, names in self._named.items():
            lines += [f"{as_line(name)}: {reason}" for name in names]
            if more := self._counts[reason] - len(names):
                lines.append(f"and {more} more: {reason}")
        return lines

    def cover(self, address: str) -> None:
        """Takes the address of a folder that has files of the run."""
        parts = address.split("/")
        if self._common is not None:
            same = takewhile(
                lambda pair: pair[0] == pair[1], zip(self._common, parts, strict=False)
            )
            parts = [part for part, _ in same]
        self._common = parts

    def name_of(self, file: ImageFile) -> str:
        """A file's path below the deepest folder that holds all inputs."""
        return file.address.removeprefix("".join(f"{part}/" for part in self._common or ()))
