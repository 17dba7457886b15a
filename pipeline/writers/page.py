"""What the writers of the output formats take."""

from __future__ import annotations

import hashlib
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from pipeline.model_config import ClassSpec
from pipeline.types import Detection

Classes = tuple[ClassSpec, ...]
"""The model's, by label."""
_MOST_BYTES = 100
"""Of a folder's or file's name; a suffix follows, and file systems allow 143 or 255 in all."""
_UNSAFE = re.compile(r'[\x00-\x1f\x7f<>:"|?*]')
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")


@dataclass(frozen=True, kw_only=True)
class Page:
    """One image and what was found in it.

    Attributes:
        name: The image's file name in the document.
        image_hw: Height and width, px.
        instances: By descending score.
        classes: The model's.
        simplify_px: Outlines may be off so far; 0 is exact.
        um_per_px: Size of a pixel, if it is known.
    """

    name: str
    image_hw: tuple[int, int]
    instances: Sequence[Detection]
    classes: Classes
    simplify_px: float = 0.0
    um_per_px: float | None = None


Write = Callable[[Page, BinaryIO], None]


def at_once(encode: Callable[[Page], bytes]) -> Write:
    """Writes what a function makes of a page into a file."""

    def write(page: Page, file: BinaryIO) -> None:
        file.write(encode(page))

    return write


def _no_files(classes: Classes) -> dict[str, bytes]:
    return {}


@dataclass(frozen=True, kw_only=True)
class OutputFormat:
    """A format and its writer.

    Attributes:
        name: In requests and commands.
        suffix: Of a file.
        media_type: Of a file.
        write: Writes a page into a file: all of that, or its part of a document, which `join`
            reads. Raises `WriteError` if the format cannot hold the page.
        join: Writes the document of several pages, given with their image ids; None if each page
            is a file.
        folder: Where the files of pages lie in the folder of several.
        add_files: Further files of that folder.
        has_outlines: Whether `Page.simplify_px` applies.
        needs: Package that must be installed for it.
    """

    name: str
    suffix: str
    media_type: str
    write: Write
    join: Callable[[Classes, Iterable[tuple[int, bytes]]], Iterator[bytes]] | None = None
    folder: str = ""
    add_files: Callable[[Classes], dict[str, bytes]] = field(default=_no_files)
    has_outlines: bool = False
    needs: str | None = None

    def encode(self, page: Page) -> bytes:
        """What `write` writes.

        Raises:
            WriteError: The format cannot hold it.
        """
        file = io.BytesIO()
        self.write(page, file)
        return file.getvalue()


def to_json(value: Any) -> bytes:
    """Compact JSON in ASCII, in one line."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def name_files(names: Iterable[str], suffix: str = "") -> list[str]:
    """Relative paths without suffix for the files of images, safe on every system, none twice.

    Folders are kept; what would leave the folder or cannot be in a file name is replaced.

    Args:
        names: File names or relative paths of the images; anything may be in them.
        suffix: What will follow each path. Its parts before the last are taken off the names:
            `a.ome.tif` with `.ome.tif` gives `a`.
    """
    inner = suffix.split(".")[1:-1]
    taken: set[str] = set()
    found = []
    for name in names:
        parts = [part for part in name.replace("\\", "/").split("/") if part.strip(". ")]
        *folders, last = parts or ["image"]
        stem, _ = _split(last)
        while (shorter := _split(stem))[1] in inner:
            stem = shorter[0]
        path = "/".join(_clean(part) for part in (*folders[-8:], stem))
        unique, number = path, 1
        while unique.casefold() in taken:
            number += 1
            unique = f"{path}_{number}"
        taken.add(unique.casefold())
        found.append(unique)
    return found


def _split(name: str) -> tuple[str, str]:
    """A name and its suffix in lower case, without the dot; empty if nothing is before it."""
    stem, dot, end = name.rpartition(".")
    return (stem, end.lower()) if dot and stem.strip(". ") else (name, "")


def _clean(part: str) -> str:
    """A safe name of a folder or file that differs for different names."""
    text = "".join("_" if unicodedata.category(c) in _UNPRINTABLE else c for c in part)
    text = _UNSAFE.sub("_", text).strip(". ") or "_"
    if _RESERVED.fullmatch(text):
        text = f"_{text}"
    data = text.encode()
    if len(data) > _MOST_BYTES:
        digest = hashlib.sha256(part.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        text = f"{data[:_MOST_BYTES].decode(errors='ignore')}-{digest}"
    return text
