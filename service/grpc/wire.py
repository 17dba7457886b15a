"""The bulk of an infer request, taken out of its bytes before protobuf parses the rest.

Protobuf makes an object of every element: two bytes of an empty tensor take a hundred, and 64 MiB
of them take gigabytes, with Python's lock held. So fields are counted here, and tensors stay where
they are in the message.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from pipeline.types import UInt8
from service.errors import BodyTooLarge, InvalidParameter, InvalidRequest

MAX_FIELDS = 1024
"""Of one message, its parts each counted by themselves."""
MAX_INPUTS = 4
"""That are read; one is allowed."""
MAX_REST_BYTES = 64 * 1024
"""Of a request without its tensors."""
_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5
_SIZES = {_FIXED_64: 8, _FIXED_32: 4}
_LONGEST_VARINT = 10
_INPUTS, _RAW = 5, 7  # fields of ModelInferRequest
_CONTENTS = 5  # of InferInputTensor
_UINTS, _FILES = 4, 8  # of InferTensorContents
_CONTENTS_NAMES = {
    1: "bool_contents",
    2: "int_contents",
    3: "int64_contents",
    _UINTS: "uint_contents",
    5: "uint64_contents",
    6: "fp32_contents",
    7: "fp64_contents",
    _FILES: "bytes_contents",
}


@dataclass(frozen=True)
class WireField:
    """A field of a message.

    Attributes:
        number: Its number.
        wire_type: How it is written.
        whole: With its number and length.
        content: Of a field with a length; else as `whole`.
    """

    number: int
    wire_type: int
    whole: memoryview
    content: memoryview


@dataclass
class RawRequest:
    """A request, its tensors apart.

    Attributes:
        rest: Everything but inputs and raw tensors, serialised.
        inputs: Each without its contents, serialised.
        contents: Of each input; None if it has none.
        raw: The raw tensors.
    """

    rest: bytes = b""
    inputs: list[bytes] = field(default_factory=list)
    contents: list[memoryview | None] = field(default_factory=list)
    raw: list[memoryview] = field(default_factory=list)


def read_fields(message: memoryview) -> Iterator[WireField]:
    """The fields of a message, in the order of their bytes.

    Raises:
        InvalidRequest: It is malformed, or has more than `MAX_FIELDS`.
    """
    at = count = 0
    while at < len(message):
        count += 1
        if count > MAX_FIELDS:
            raise InvalidRequest(f"a part of the message has more than {MAX_FIELDS} fields")
        tag, start = _read_varint(message, at)
        end, wire_type = start, tag & 7
        if wire_type == _VARINT:
            _, end = _read_varint(message, start)
        elif wire_type == _BYTES:
            size, start = _read_varint(message, start)
            end = start + size
        elif wire_type in _SIZES:
            end = start + _SIZES[wire_type]
        else:
            raise InvalidRequest(f"the message is malformed: wire type {wire_type} at byte {at}")
        if end > len(message):
            raise InvalidRequest(
                f"the message is malformed: field {tag >> 3} at byte {at} has {end - start} "
                f"bytes, but only {len(message) - start} remain"
            )
        first = start if wire_type == _BYTES else at
        yield WireField(tag >> 3, wire_type, message[at:end], message[first:end])
        at = end


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    """A number, and the position after it."""
    value = 0
    for index, byte in enumerate(message[at : at + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    raise InvalidRequest(f"the message is malformed: the number at byte {at} has no end")


def split_request(message: bytes) -> RawRequest:
    """Takes the tensors out of a ModelInferRequest.

    Raises:
        InvalidRequest: It is malformed, or has too many fields.
        BodyTooLarge: It has more than `MAX_REST_BYTES` without its tensors.
    """
    request = RawRequest()
    rest: list[memoryview] = []
    for part in read_fields(memoryview(message)):
        if part.wire_type == _BYTES and part.number == _RAW:
            request.raw.append(part.content)
        elif part.wire_type == _BYTES and part.number == _INPUTS:
            if len(request.inputs) == MAX_INPUTS:
                raise InvalidRequest(f"the request has more than {MAX_INPUTS} inputs")
            own, contents = _split_input(part.content)
            request.inputs.append(own)
            request.contents.append(contents)
        else:
            rest.append(part.whole)
    size = sum(map(len, rest)) + sum(map(len, request.inputs))
    if size > MAX_REST_BYTES:
        raise BodyTooLarge(
            f"the message without its tensors has {size} bytes, the limit is {MAX_REST_BYTES}"
        )
    request.rest = b"".join(rest)
    return request


def _split_input(tensor: memoryview) -> tuple[bytes, memoryview | None]:
    rest: list[memoryview] = []
    contents = None
    for part in read_fields(tensor):
        if part.wire_type == _BYTES and part.number == _CONTENTS:
            if contents is not None:
                raise InvalidRequest("an input has its field 'contents' more than once")
            contents = part.content
        else:
            rest.append(part.whole)
    return b"".join(rest), contents


def read_files(contents: memoryview, most: int) -> list[bytes]:
    """The files of `bytes_contents`, at most one more than `most`.

    Raises:
        InvalidParameter: There are other contents.
    """
    files: list[bytes] = []
    for part in read_fields(contents):
        _check(part, _FILES, "BYTES")
        files.append(bytes(part.content))
        if len(files) > most:
            break
    return files


def read_uints(contents: memoryview) -> UInt8:
    """The numbers of `uint_contents`.

    Raises:
        InvalidParameter: There are other contents, or a number is above 255.
    """
    parts = []
    for part in read_fields(contents):
        _check(part, _UINTS, "UINT8")
        parts.append(_unpack(np.frombuffer(part.content, np.uint8)))
    return np.concatenate([np.empty(0, np.uint8), *parts])


def _check(part: WireField, expected: int, datatype: str) -> None:
    if part.number != expected or part.wire_type != _BYTES:
        name = _CONTENTS_NAMES.get(part.number, f"field {part.number}")
        raise InvalidParameter(
            f"the contents of a {datatype} 'image' must be {_CONTENTS_NAMES[expected]}, packed, or "
            f"raw_input_contents, not {name}"
        )


def _unpack(packed: UInt8) -> UInt8:
    """Numbers 0..255 of a packed field: one byte below 128, else two."""
    if not packed.size:
        return packed
    goes_on = packed >= 0x80
    second = np.zeros_like(goes_on)
    second[1:] = goes_on[:-1]
    if goes_on[-1] or (second & (packed != 1)).any():
        raise InvalidParameter("a UINT8 'image' must have integers 0..255, not all of them are")
    # A second byte can only be 1: bit 7 of the value, which the first byte has set already.
    return packed[~second]
