from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import ServiceError, TooManyImages
from service.http.oip import data as module
from service.http.oip.data import DataArray, decode_files, decode_pixels, find_data

RNG = np.random.default_rng(0)


@pytest.fixture(params=[24, 64, None], ids=["pieces of 24", "pieces of 64", "as it is"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small pieces, so that there are many."""
    if request.param is not None:
        monkeypatch.setattr(module, "_PIECE_BYTES", request.param)
        monkeypatch.setattr(module, "_WINDOW_BYTES", request.param)
    yield


def cut(text: str | bytes) -> DataArray:
    found = find_data(text.encode() if isinstance(text, str) else text, 1000)
    assert found is not None
    return found


def shown(data: DataArray) -> bytes:
    return data.text[data.start : data.end]


@pytest.mark.parametrize(
    ("text", "array"),
    [
        ('{"data": [1, 2], "b": [3]}', "[1, 2]"),
        ('{"a": [{"data":[[1],[2]]}, 3]}', "[[1],[2]]"),
        ('{"data" :\n[ "ab" ,\t"c]}" ], "b": ["d"]}', '[ "ab" ,\t"c]}" ]'),
        ('{"data": []}', "[]"),
        ('{"a": "data", "data": 1, "b": {"data": ["x"]}}', '["x"]'),
        (r'{"a": "\"data\": [1]", "data": [2]}', "[2]"),
        (r'{"x\"data": [1], "data": [2]}', "[2]"),
        ('{"data": [true]}', "[true]"),
    ],
)
@pytest.mark.usefixtures("pieces")
def test_the_array_is_found(text: str, array: str) -> None:
    assert shown(cut(text)) == array.encode()


@pytest.mark.parametrize(
    "text",
    ["", "{}", '{"data": 1}', '"data"', '{"data": "a"}', '{"d\\u0061ta": [1]}', '{"Data": [1]}'],
)
def test_there_may_be_no_array(text: str) -> None:
    assert find_data(text.encode(), 1000) is None


def test_the_name_is_searched_at_the_beginning_alone() -> None:
    text = b'{"a": "%b", "data": [1]}' % (b"x" * 100)
    assert find_data(text, 100) is None
    assert find_data(text, 200) is not None


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"data": [', "end"),
        ('{"data": [1, 2', "end"),
        ('{"data": ["a"', "must be followed"),
        ('{"data": ["a', "no end"),
        ('{"data": ["a" "b"]', "element 0 of 'data' must be followed"),
        ('{"data": ["a", 1]}', "element 1 of 'data' is not a string"),
        ('{"data": ["a",]}', "element 1 of 'data' is not a string"),
        ('{"data": [1, "a"]}', "only strings, or only numbers"),
        ('{"data": [{"a": 1}]}', "only strings, or only numbers"),
    ],
)
def test_a_broken_array_is_explained(text: str, named: str) -> None:
    with pytest.raises(ServiceError, match=named):
        find_data(text.encode(), 1000)


def test_strings_are_counted_before_they_are_read() -> None:
    with pytest.raises(TooManyImages, match="4096"):
        find_data(b'{"data": [%b""]}' % (b'"",' * 5000), 1000)


@pytest.mark.usefixtures("pieces")
@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=4), st.randoms(use_true_random=False))
def test_files_come_through_whatever_is_escaped(files: list[bytes], random: Any) -> None:
    def write(character: str) -> str:
        forms = [character, f"\\u{ord(character):04x}", f"\\u{ord(character):04X}"]
        return str(random.choice([*forms, "\\/"] if character == "/" else forms))

    texts = ("".join(map(write, base64.b64encode(file).decode())) for file in files)
    quoted = [f'"{text}"' for text in texts]
    array = cut(json.dumps({"data": []}).replace("[]", "[" + ", ".join(quoted) + "]"))
    assert decode_files(array) == files


@pytest.mark.parametrize(
    "text",
    ["a", "AAA", "A===", "AA==AA==", "AA A", "AA\\n", "é", "\\ud800", "\\x", "A\\", "AAAA="],
)
@pytest.mark.usefixtures("pieces")
def test_what_is_not_base64_is_refused(text: str) -> None:
    with pytest.raises(ServiceError, match=r"not base64|followed"):
        decode_files(cut(f'{{"data": ["AAAA", "{text}"]}}'))


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("indent", [None, 1])
def test_pixels_come_through_flat_or_nested(indent: int | None) -> None:
    pixels = RNG.integers(0, 256, (5, 7, 3)).astype(np.uint8)
    for values in (pixels.reshape(-1).tolist(), pixels.tolist()):
        array = cut(json.dumps({"data": values, "b": "c"}, indent=indent))
        assert np.array_equal(decode_pixels(array, (5, 7, 3)), pixels)


@pytest.mark.parametrize(
    ("array", "named"),
    [
        ("[1,2,3]", "does not match 3 numbers"),
        ("[1,2,3,4,5,6,7]", "does not match"),
        ("[1,2,3,4,5,256]", "0..255"),
        ("[1,2,3,4,5,-1]", "0..255"),
        ("[1,2,3,4,5,1.0]", "0..255"),
        ("[1,2,3,4,5,1e1]", "0..255"),
        ("[1,2,3,4,5,06]", "0..255"),
        ("[1,2,3,4,5 6]", "0..255"),
        ("[1,2,3,4,,5,6]", "0..255"),
        ("[1,2,3,4,5,6,]", "0..255|nested"),
        ("[1,2,3,4,5,null]", "0..255"),
        ("[1,2,3,4,5,true]", "nested"),
        ("[[1,2,3],[4,5,6]]", "nested"),
        ("[[[1,2,3]],[[4,5,6]]]", "nested"),
        ("[[[1,2,3],[4,5,6]]", "nested"),
        ("[[[1,2,3][4,5,6]]]", "0..255|nested"),
        ("[]1,2,3,4,5,6]", "0..255|nested"),
        ("[[[1,2,3],[4,5],6]]", "nested"),
        ("[NaN,2,3,4,5,6]", "0..255"),
    ],
)
@pytest.mark.usefixtures("pieces")
def test_other_numbers_are_refused(array: str, named: str) -> None:
    with pytest.raises(ServiceError, match=f"{named}|takes more than"):
        decode_pixels(cut(f'{{"data": {array}}}'), (1, 2, 3))


@pytest.mark.parametrize(
    "array",
    [
        b"[" + b"255," * 400_000 + b"0]",
        b"[" + b"[[0,0,0]]," * 200_000 + b"0]",
        b"[" + b" " * 1_000_000 + b"]",
        b"[" + b"1" * 1_000_000 + b"]",
        b"[" + b"[" * 1_000_000 + b"]",
        b'["' + b"A" * 1_000_000 + b'"]',
        b'["' + b"\\u0041" * 200_000 + b'"]',
        b'["' + "é".encode() * 500_000 + b'"]',
    ],
)
def test_no_call_parses_much_at_once(array: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop's thread waits while one call has Python's lock."""
    longest = 0

    def loads(text: bytes) -> Any:
        nonlocal longest
        longest = max(longest, len(text))
        return orjson.loads(text)

    class Counting:
        JSONDecodeError = orjson.JSONDecodeError

    Counting.loads = staticmethod(loads)  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "orjson", Counting)
    found = cut(b'{"data": %b}' % array)
    for decode in (decode_files, lambda data: decode_pixels(data, (1000, 1000, 3))):
        try:
            decode(found)
        except ServiceError as error:
            assert len(str(error)) < 500
    assert longest <= 256 * 1024 + 2
