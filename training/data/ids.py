"""Ids of annotation files, which may be written as text."""

from __future__ import annotations

import re
from typing import Any

from training.data.records import ImageId

_WHOLE = re.compile(r"\s*-?[0-9]{1,18}\s*", re.ASCII)
_LARGEST_ID = 2**53


def read_whole(value: Any) -> int | None:
    """A whole number, which may be written as text or with a decimal point; else None."""
    text = isinstance(value, str) and _WHOLE.fullmatch(value)
    if text or (isinstance(value, float) and value.is_integer()):
        value = int(value)
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST_ID
    return int(value) if whole else None


def read_image_id(value: Any) -> ImageId | None:
    """An id of digits is a number, any other text stays text."""
    whole = read_whole(value)
    return whole if whole is not None else value if isinstance(value, str) and value else None
