"""The array `data` of an input, read without parsing it as JSON.

A JSON parser works on the whole body at once, holds Python's lock meanwhile and makes an object of
every number: 64 MiB stop the event loop for 0.1 to 0.3 s and take gigabytes. So the array is cut
out of the JSON, of which little is left, and is then read in pieces.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import orjson
import pybase64

from pipeline.types import UInt8
from service.errors import InvalidParameter, InvalidRequest, TooManyImages

_WINDOW_BYTES = 4 * 2**20
"""Searched by one call."""
_PIECE_BYTES = 256 * 1024
"""Parsed by one call."""
_MAX_STRINGS = 4096
_KEY = b'"data"'
_OPENING = re.compile(rb"[ \t\r\n]{0,256}:[ \t\r\n]{0,256}\[[ \t\r\n]{0,256}")
_COMMA = re.compile(rb"[ \t\r\n]{0,256},[ \t\r\n]{0,256}")
_CLOSING = re.compile(rb"[ \t\r\n]{0,256}\]")
_LONGEST_ESCAPE = 6
_DIGITS_AND_SPACE = b"0123456789 \t\r\n"
_BRACKETS_TO_SPACES = bytes.maketrans(b"[]", b"  ")


@dataclass(frozen=True)
class DataArray:
    """Where an array `data` is in a body.

    Attributes:
        text: The body.
        start: Position of its opening bracket.
        end: Position after its closing bracket.
        strings: Bounds of its elements' contents, if they are strings; None: anything else.
    """

    text: bytes
    start: int
    end: int
    strings: list[tuple[int, int]] | None


def find_data(text: bytes, within: int) -> DataArray | None:
    """The first array that is the value of a member `data`; None if there is none.

    Args:
        text: JSON that was not checked, so an array without strings may contain anything.
        within: The name is searched in so many bytes.

    Raises:
        InvalidRequest, InvalidParameter: The array is malformed.
        TooManyImages: It has more strings than any request may have images.
    """
    at = text.find(_KEY, 0, within)
    while at >= 0:
        opening = _OPENING.match(text, at + len(_KEY))
        if opening is not None and text[at - 1 : at] != b"\\":
            start, first = text.index(b"[", at), opening.end()
            if text[first : first + 1] == b'"':
                strings, end = _find_strings(text, first)
                return DataArray(text, start, end, strings)
            return DataArray(text, start, _find_end(text, first), None)
        at = text.find(_KEY, at + 1, within)
    return None


def _find(text: bytes, part: bytes, start: int, end: int) -> int:
    """As `bytes.find`, but lets other threads run meanwhile."""
    for at in range(start, end, _WINDOW_BYTES):
        found = text.find(part, at, min(at + _WINDOW_BYTES + len(part) - 1, end))
        if found >= 0:
            return found
    return -1


def _find_strings(text: bytes, at: int) -> tuple[list[tuple[int, int]], int]:
    """The contents of strings from the first one's quote on, and the end of their array.

    An escaped quote ends a string too early; it is not base64 anyway.
    """
    strings: list[tuple[int, int]] = []
    while True:
        if text[at : at + 1] != b'"':
            raise InvalidParameter(f"element {len(strings)} of 'data' is not a string")
        close = _find(text, b'"', at + 1, len(text))
        if close < 0:
            raise InvalidRequest("the JSON is invalid: the array 'data' has no end")
        if len(strings) == _MAX_STRINGS:
            raise TooManyImages(f"the array 'data' has more than {_MAX_STRINGS} strings")
        strings.append((at + 1, close))
        closing = _CLOSING.match(text, close + 1)
        if closing is not None:
            return strings, closing.end()
        comma = _COMMA.match(text, close + 1)
        if comma is None:
            raise InvalidRequest(
                f"the JSON is invalid: element {len(strings) - 1} of 'data' must be followed by a "
                "comma or a bracket"
            )
        at = comma.end()


def _find_end(text: bytes, start: int) -> int:
    """The end of an array without strings and objects: its last bracket before any of them."""
    stop = len(text)
    for sign in (b'"', b"}"):
        found = _find(text, sign, start, stop)
        stop = stop if found < 0 else found
    end = text.rfind(b"]", start, stop)
    if end < 0:
        raise InvalidParameter("the array 'data' must have only strings, or only numbers, and end")
    return end + 1


def decode_files(data: DataArray) -> list[bytes]:
    """The files of an array of base64 strings.

    Raises:
        InvalidParameter: An element is not a string, or not base64.
    """
    if data.strings is None:
        elements = data.text[data.start + 1 : min(data.end - 1, data.start + 50)]
        if elements.strip():
            shown = elements.decode("utf-8", "replace")
            raise InvalidParameter(f"a file must be a base64 string, not {shown}")
        return []
    return [_decode_file(data.text, index, *bounds) for index, bounds in enumerate(data.strings)]


def _decode_file(text: bytes, index: int, start: int, end: int) -> bytes:
    content = memoryview(text)[start:end]
    try:
        if _find(text, b"\\", start, end) >= 0:
            content = memoryview(_unescape(text, start, end))
        return pybase64.b64decode(content, validate=True)
    except ValueError as error:
        shown = text[start : min(end, start + 20)].decode("utf-8", "replace")
        raise InvalidParameter(
            f"file {index} is not base64: {error}; starts with {shown!r}"
        ) from error


def _unescape(text: bytes, start: int, end: int) -> bytes:
    r"""A string's content without JSON's escapes; encoders write `/` as `\/` or `+` as `\u002b`."""
    pieces = []
    while start < end:
        stop = min(start + _PIECE_BYTES, end)
        if stop < end:
            escape = text.rfind(b"\\", stop - _LONGEST_ESCAPE + 1, stop)
            stop = stop if escape < 0 else escape
        pieces.append(orjson.loads(b'"%b"' % text[start:stop]).encode())
        start = stop
    return b"".join(pieces)


def decode_pixels(data: DataArray, shape: Sequence[int]) -> UInt8:
    """The pixels of an array of numbers, flat or nested as the shape.

    Args:
        data: The array.
        shape: [H, W, 3].

    Raises:
        InvalidParameter: Not integers in 0..255, or not as many, or nested otherwise.
    """
    size = shape[0] * shape[1] * shape[2]
    values, skeleton = bytearray(), bytearray()
    at = data.start
    while at < data.end and len(values) <= size:
        stop = data.end
        if stop - at > _PIECE_BYTES:
            stop = data.text.rfind(b",", at, at + _PIECE_BYTES)
        if stop < 0:
            raise InvalidParameter(f"one of the numbers takes more than {_PIECE_BYTES} bytes")
        piece = data.text[at:stop]
        values += _decode_numbers(piece)
        skeleton += piece.translate(None, _DIGITS_AND_SPACE)
        if stop < data.end:
            skeleton += b","
        at = stop + 1
    if len(values) != size:
        found = f"{len(values)}" if at > data.end else f"at least {len(values)}"
        raise InvalidParameter(f"the shape {list(shape)} does not match {found} numbers")
    if skeleton not in (b"[" + b"," * (size - 1) + b"]", _nest(shape)):
        raise InvalidParameter(
            f"the numbers must be flat, or in nested lists of the shape {list(shape)}"
        )
    return np.frombuffer(values, np.uint8).reshape(shape)


def _decode_numbers(piece: bytes) -> bytes:
    try:
        return bytes(orjson.loads(b"[%b]" % piece.translate(_BRACKETS_TO_SPACES)))
    except (TypeError, ValueError) as error:
        shown = piece[:50].decode("utf-8", "replace")
        raise InvalidParameter(
            f"a UINT8 'image' must have integers 0..255, not all of {shown!r} are"
        ) from error


def _nest(shape: Sequence[int]) -> bytes:
    """What is left of nested lists of this shape without their numbers."""
    text = b""
    for length in reversed(shape):
        text = b"[" + b",".join([text] * length) + b"]"
    return text
