"""JSON without what later readers and writers cannot represent."""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from typing import Any

MAX_DEPTH = 64
MAX_JSON_INT = 2**63 - 1


def parse_json(text: str | bytes) -> Any:
    """Parses JSON; every value can be written as UTF-8 JSON again.

    Raises:
        ValueError: Not JSON, nested deeper than `MAX_DEPTH`, or with a doubled key, a number that
            is not finite or beyond 64 bits, or text that is not Unicode; the message names it.
    """
    try:
        content = json.loads(text, object_pairs_hook=_build_object)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    level = [content]
    for _ in range(MAX_DEPTH + 1):
        if not level:
            return content
        level = [child for value in level for child in _check_value(value)]
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((doubled, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {reprlib.repr(doubled)} stands twice in one object")
    return found


def _check_value(value: Any) -> list[Any]:
    """Checks a value; returns its keys and elements, which have to be checked next."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, list):
        return value
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the text {reprlib.repr(value)} is not Unicode") from None
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"the number {value} is not finite")
    elif isinstance(value, int) and abs(value) > MAX_JSON_INT:
        raise ValueError(f"the number {reprlib.repr(value)} is beyond 64 bits")
    return []
