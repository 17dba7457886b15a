"""Says what is wrong with parameters and fields that pydantic has refused."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

_MOST_ERRORS = 10
_SHORT = reprlib.Repr()
_SHORT.maxstring = 100


def explain_errors(errors: Sequence[Mapping[str, Any]], kind: str) -> str:
    """Lists each wrong value with its name; long values and lists are abbreviated.

    Args:
        errors: Each with `loc`, the path to the value, `type`, `msg` and `input`.
        kind: What the values are, e.g. "parameter".
    """
    parts = []
    for error in errors[:_MOST_ERRORS]:
        name = ".".join(str(part) for part in error["loc"]) or "the body"
        reason = error["msg"].removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            parts.append(f"there is no {kind} {_SHORT.repr(name)}")
        elif not error["loc"] and error["type"] == "value_error":
            parts.append(reason)  # of a validator of the whole, which names the value itself
        else:
            parts.append(f"{name}: {reason}, not {_SHORT.repr(error['input'])}")
    if len(errors) > _MOST_ERRORS:
        parts.append(f"and {len(errors) - _MOST_ERRORS} more")
    return "; ".join(parts)
