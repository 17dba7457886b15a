"""Reads COCO JSON; its annotations are parsed one at a time.

The 860,000 annotations of COCO 2017 take gigabytes as Python objects, so nothing keeps them all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.data.content import CocoContent
from training.data.records import DatasetError

YEARS = ("", "2017")
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


def find_split(root: Path, split: str) -> tuple[Path, Path]:
    """Annotation file and image folder of a split.

    Finds `annotations/{split}.json` with `images/`, and COCO 2017 as downloaded:
    `annotations/instances_{split}2017.json` with `{split}2017/`, and for `test-dev`
    `annotations/image_info_test-dev2017.json` with `test2017/`.

    Raises:
        DatasetError: There is no such file; lists those that were searched.
    """
    name = split.removeprefix("instances_").removeprefix("image_info_")
    stems = [split] + [
        prefix + name + year for prefix in ("", "instances_", "image_info_") for year in YEARS
    ]
    files = [root / "annotations" / f"{stem}.json" for stem in dict.fromkeys(stems)]
    found = [file for file in files if file.is_file()]
    if not found:
        tried = ", ".join(str(file) for file in files)
        raise DatasetError(f"no annotations of split {split!r}: looked for {tried}")
    names = dict.fromkeys((name, name.replace("-dev", "")))  # test-dev is a part of test
    folders = ["images", *(n + year for n in names for year in YEARS)]
    for folder in folders:
        if (root / folder).is_dir():
            return found[0], root / folder
    raise DatasetError(f"{root} has no image folder: looked for {', '.join(folders)}")


def read_coco_json(path: Path, image_folder: Path) -> CocoContent:
    """The content of an annotation file; a byte order mark is skipped.

    Raises:
        DatasetError: It is not JSON, or not an object with `images` and `categories`; also while
            the annotations are iterated.
    """
    content: dict[str, Any] = {}
    annotations = None
    try:
        data = path.read_bytes()
        text = data.decode(json.detect_encoding(data))
        del data
        at = _expect(text, 0, "{")
        while text[at : at + 1] != "}":
            key, at = _DECODER.raw_decode(text, at)
            at = _expect(text, at, ":")
            if key == "annotations":
                annotations = _Annotations(text, at)
                at = annotations.skip()
            else:
                content[key], at = _DECODER.raw_decode(text, at)
            at = _next(text, at, "}")
        if (end := _after_space(text, at + 1)) != len(text):
            raise json.JSONDecodeError("extra data", text, end)
        images, categories = content["images"], content["categories"]
    except KeyError as error:
        raise DatasetError(f"{path} is not COCO JSON: it has no {error}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is not COCO JSON: {error}") from error
    return CocoContent(str(path), image_folder, images, categories, annotations)


class _Annotations:
    """The elements of the array at a position, parsed anew for each iteration."""

    def __init__(self, text: str, start: int) -> None:
        self._text, self._start = text, start

    def skip(self) -> int:
        """The position after the array."""
        return max(end for _, end in self._elements())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for element, _ in self._elements():
            if element is not None:
                yield element[0]

    def _elements(self) -> Iterator[tuple[tuple[Any] | None, int]]:
        """Each element and the position after it; at last None and the end of the array."""
        text = self._text
        at = _expect(text, self._start, "[")
        while text[at : at + 1] != "]":
            element, at = _DECODER.raw_decode(text, at)
            yield (element,), at
            at = _next(text, at, "]")
        yield None, at + 1


def _expect(text: str, at: int, sign: str) -> int:
    """The position after a sign and the white space around it."""
    at = _after_space(text, at)
    if text[at : at + 1] != sign:
        raise json.JSONDecodeError(f"expecting {sign!r}", text, at)
    return _after_space(text, at + 1)


def _next(text: str, at: int, end: str) -> int:
    """The position of the next element, or of the end sign."""
    at = _after_space(text, at)
    return at if text[at : at + 1] == end else _expect(text, at, ",")


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None  # the pattern also matches the empty string
    return match.end()
