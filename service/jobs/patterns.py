"""Which entries below a folder are images of a run, judged by their names alone."""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Self

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib"),
    *(".tif", ".tiff", ".btf", ".tf8", ".svs", ".ndpi", ".dcm", ".ozx"),
    *(".jp2", ".j2k", ".jpf", ".j2c", ".jpc"),
)
_SUFFIXES_ZARR = (".zarr.zip",)
_RECURSIVE = "**"
_SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini", ".ds_store")
_APPLE_DOUBLE = "._"

States = frozenset[int]
"""Positions in a pattern that the parts of a path so far can have reached."""


class Pattern:
    """A glob below a folder; `**` stands for any number of folders.

    As in a shell, wildcards match hidden names only after a written dot. A pattern that ends in
    `**` accepts the files with a suffix of an image; otherwise the last part decides.

    Args:
        parts: The parts of the pattern between slashes.
    """

    def __init__(self, parts: Sequence[str]) -> None:
        self._parts = tuple(parts)
        self.start = self._close({0})

    @classmethod
    def split(cls, path: Sequence[str]) -> tuple[Sequence[str], Self]:
        """The parts of a path before its first wildcard, and the pattern of the others."""
        count = next(index for index, part in enumerate(path) if glob.has_magic(part))
        return path[:count], cls(path[count:])

    def _close(self, states: set[int]) -> States:
        """Adds the positions behind `**`, which can stand for no folder."""
        for state in sorted(states):
            while state < len(self._parts) and self._parts[state] == _RECURSIVE:
                state += 1
                states.add(state)
        return frozenset(states)

    def step(self, states: States, name: str, *, written_dot: bool = False) -> States:
        """The positions after one more part of a path; empty: the pattern does not match it.

        Args:
            states: The positions before it.
            name: The part.
            written_dot: Only through parts of the pattern that begin with a dot.
        """
        after = set()
        for state in states:
            part = self._parts[state] if state < len(self._parts) else ""
            if written_dot and not part.startswith("."):
                continue
            if part == _RECURSIVE:
                after.add(state)
            elif part and fnmatch.fnmatch(name, part):
                after.add(state + 1)
        return self._close(after)

    def accepts(self, states: States) -> bool:
        """Whether a path that leads to these positions matches the whole pattern."""
        return len(self._parts) in states

    def descends(self, states: States) -> bool:
        """Whether paths below one that leads to these positions can match."""
        return any(state < len(self._parts) for state in states)

    def refuse_name(self, states: States, name: str) -> str | None:
        """The reason why the entry of this name is left out, be it a file or a folder."""
        if name.startswith(_APPLE_DOUBLE) or name.lower() in _SYSTEM_FILES:
            return "a file of the operating system"
        if name.startswith(".") and not self.step(states, name, written_dot=True):
            return "hidden"
        return None

    def refuse_file(self, name: str) -> str | None:
        """The reason why a file of this name, which the pattern accepts, is left out."""
        if self._parts[-1] != _RECURSIVE or PurePosixPath(name).suffix.lower() in SUFFIXES:
            return None
        if name.lower().endswith(_SUFFIXES_ZARR):
            return None
        return "no suffix of a supported image"


EVERYTHING = Pattern([_RECURSIVE])
"""The images at any depth below a folder."""
