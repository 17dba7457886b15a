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

REQUIRED = ("images", "categories")
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


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
        start = _read_fields(text, _expect(text, 0, "{"), content)
        if start is not None:
            annotations = _Annotations(path, text, start)
            missing = [key for key in REQUIRED if key not in content]
            if missing and not _read_last_fields(text, start, missing, content):
                content.update(annotations.scan_rest())
        images, categories = (content[key] for key in REQUIRED)
    except KeyError as error:
        raise DatasetError(f"{path} is not COCO JSON: it has no {error}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise _refused(path, error) from error
    return CocoContent(str(path), image_folder, images, categories, annotations)


class _Annotations:
    """The elements of the array at a position, parsed anew for each iteration.

    After the last one, the rest of the file is checked.

    Raises:
        DatasetError: While it is iterated: the file is not JSON.
    """

    def __init__(self, path: Path, text: str, start: int) -> None:
        self._path, self._text, self._start = path, text, start

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self._elements({})
        except (TypeError, ValueError, RecursionError) as error:
            raise _refused(self._path, error) from error

    def scan_rest(self) -> dict[str, Any]:
        """The fields after the array."""
        content: dict[str, Any] = {}
        for _ in self._elements(content):
            pass
        return content

    def _elements(self, content: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields the elements; at last reads the fields after them into `content`."""
        text = self._text
        at = _expect(text, self._start, "[")
        while text[at : at + 1] != "]":
            element, at = _DECODER.raw_decode(text, at)
            yield element
            at = _next(text, at, "]")
        second = _read_fields(text, _next(text, at + 1, "}"), content)
        if second is not None:
            raise json.JSONDecodeError("annotations for the second time", text, second)


def _refused(path: Path, error: Exception) -> DatasetError:
    return DatasetError(f"{path} is not COCO JSON: {error}")


def _read_fields(text: str, at: int, content: dict[str, Any]) -> int | None:
    """Reads fields up to the annotations, whose position is returned, or to the end of the file."""
    while text[at : at + 1] != "}":
        key, at = _DECODER.raw_decode(text, at)
        at = _expect(text, at, ":")
        if key == "annotations":
            return at
        content[key], at = _DECODER.raw_decode(text, at)
        at = _next(text, at, "}")
    if (end := _after_space(text, at + 1)) != len(text):
        raise json.JSONDecodeError("extra data", text, end)
    return None


def _read_last_fields(text: str, start: int, keys: list[str], content: dict[str, Any]) -> bool:
    """Reads fields after the annotations without parsing these; whether all `keys` were found.

    What can be read from a key to the end of the file, with one closing brace, belongs to the
    outermost object: the key's first quote cannot lie in a string of a valid file.
    """
    at = min(text.rfind(f'"{key}"', start) for key in keys)
    found: dict[str, Any] = {}
    if at < 0 or text[at - 1] == "\\":
        return False
    try:
        position = _read_fields(text, at, found)
    except (ValueError, RecursionError):
        return False
    content.update(found)
    return position is None and all(key in content for key in keys)


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
