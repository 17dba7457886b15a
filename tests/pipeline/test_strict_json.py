from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.strict_json import MAX_DEPTH, parse_json


def nest(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -(2**63) + 1,
        2**63 - 1,
        1.5,
        "",
        "é😀\n",
        [],
        {},
        {"a": [{"a": 1}, {"a": 2}], "b": {"a": None}},
    ],
)
def test_values_are_read_as_json_reads_them(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value).encode()) == value


def test_nesting_is_bounded() -> None:
    assert parse_json(nest(MAX_DEPTH)) == json.loads(nest(MAX_DEPTH))
    for text in (nest(MAX_DEPTH + 1), nest(200_000), "[" * 200_000, '{"a":' * 200_000):
        with pytest.raises(ValueError, match=r"nested deeper than 64 levels"):
            parse_json(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        (b"\xff", "can't decode"),
        ('{"a": 1, "b": 2, "b": 3}', "the key 'b' stands twice"),
        ('[{"x": {"a": 1, "a": 1}}]', "the key 'a' stands twice"),
        ("NaN", "nan is not finite"),
        ('{"a": [-Infinity]}', "-inf is not finite"),
        ("1e400", "inf is not finite"),
        (str(2**63), "9223372036854775808 is beyond 64 bits"),
        (f"[{-(10**1000)}]", "beyond 64 bits"),
        ("9" * 5000, "4300"),
        ('"\\ud800"', "is not Unicode"),
        ('{"\\udfff": 1}', "is not Unicode"),
    ],
)
def test_what_cannot_be_written_again_is_refused(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)
