"""Parses the body of an infer request.

The body is JSON; or Inference-Header-Content-Length bytes of JSON followed by binary input data.
"""

from __future__ import annotations

import base64
import binascii
import reprlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import orjson
from pydantic import ValidationError

from pipeline.types import UInt8
from service.errors import (
    BodyTooLarge,
    EmptyBody,
    InvalidParameter,
    InvalidRequest,
    TooManyImages,
)
from service.http.oip.schemas import OUTPUTS, InferInput, InferParameters, InferRequest, OutputName

MAX_JSON_VALUES = 2_000_000
"""Most numbers, lists and objects in the JSON: parsed, they take up to 30 times the memory of
their text. A base64 file is one value of any size."""
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class InferCall:
    """A parsed infer request.

    Attributes:
        request_id: Returned in the response.
        images: Encoded files, or RGB pixels [H, W, 3].
        parameters: Of the request.
        outputs: Requested outputs in order, and whether each is binary.
    """

    request_id: str | None
    images: Sequence[bytes | UInt8]
    parameters: InferParameters
    outputs: dict[OutputName, bool]


def read_request(body: bytes, header_length: int | None, max_images: int) -> InferCall:
    """Parses a request's body.

    Args:
        body: The complete body.
        header_length: Length of the JSON in bytes; None if the whole body is JSON.
        max_images: Maximum number of images.

    Raises:
        InvalidRequest, InvalidParameter, EmptyBody, TooManyImages: The message names the fault.
        BodyTooLarge: The JSON has more than `MAX_JSON_VALUES` values.
    """
    if not body:
        raise EmptyBody("the body is empty, expected the protocol's JSON")
    if header_length is not None and header_length > len(body):
        raise InvalidRequest(
            f"Inference-Header-Content-Length is {header_length}, but the body has "
            f"{len(body)} bytes"
        )
    request = _read_json(body[:header_length])
    binary = memoryview(body)[len(body) if header_length is None else header_length :]
    parameters = request.parameters or InferParameters()
    images = _read_images(request.inputs[0], binary, max_images)
    return InferCall(request.id, images, parameters, _choose_outputs(request, parameters))


def _choose_outputs(request: InferRequest, parameters: InferParameters) -> dict[OutputName, bool]:
    default = parameters.binary_data_output
    if not request.outputs:
        return dict.fromkeys(OUTPUTS, default)
    chosen = {}
    for output in request.outputs:
        own = None if output.parameters is None else output.parameters.binary_data
        chosen[output.name] = default if own is None else own
    return chosen


def _read_json(text: bytes) -> InferRequest:
    values = sum(text.count(character) for character in (b",", b"[", b"{"))
    if values > MAX_JSON_VALUES:
        raise BodyTooLarge(
            f"the JSON has about {values} values, the limit is {MAX_JSON_VALUES}; "
            "send pixels as binary data"
        )
    try:
        return InferRequest.model_validate(orjson.loads(text))
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the {len(text)} bytes of JSON are invalid: {error}") from error
    except ValidationError as error:
        raise InvalidParameter(_explain(error)) from error


def _explain(error: ValidationError) -> str:
    """Lists each invalid field with its value; abbreviated, because a value can be large."""
    parts = []
    for item in error.errors(include_url=False):
        name = ".".join(str(part) for part in item["loc"]) or "the body"
        if item["type"] == "extra_forbidden":
            parts.append(f"unknown field {name!r}")
        else:
            parts.append(f"{name}: {item['msg']}, not {reprlib.repr(item['input'])}")
    return "; ".join(parts)


def _read_images(
    tensor: InferInput, binary: memoryview, max_images: int
) -> Sequence[bytes | UInt8]:
    size = None if tensor.parameters is None else tensor.parameters.binary_data_size
    if (size is None) == (tensor.data is None):
        found = "neither" if size is None else "both"
        raise InvalidRequest(f"the input 'image' must have data or binary_data_size, not {found}")
    if len(binary) != (size or 0):
        raise InvalidRequest(
            f"binary_data_size is {size or 0}, but {len(binary)} bytes follow the JSON"
        )
    if tensor.datatype == "UINT8":
        return [_read_pixels(tensor.shape, binary if tensor.data is None else tensor.data)]
    if len(tensor.shape) != 1:
        raise InvalidParameter(f"the shape of a BYTES 'image' must be [N], not {tensor.shape}")
    if tensor.shape[0] > max_images:
        raise TooManyImages(
            f"a request may have at most {max_images} images, not {tensor.shape[0]}"
        )
    files = _split_files(binary) if tensor.data is None else _decode_files(tensor.data)
    if len(files) != tensor.shape[0]:
        raise InvalidParameter(f"the shape {tensor.shape} does not match {len(files)} files")
    return files


def _split_files(binary: memoryview) -> list[bytes]:
    """Splits binary data of the form (length, file)*."""
    files: list[bytes] = []
    offset = 0
    while offset < len(binary):
        start = offset + _LENGTH.size
        if start > len(binary):
            raise InvalidRequest(
                f"the binary data ends inside a length field, after {len(files)} files"
            )
        (length,) = _LENGTH.unpack_from(binary, offset)
        offset = start + length
        if offset > len(binary):
            raise InvalidRequest(
                f"file {len(files)} should have {length} bytes, but only "
                f"{len(binary) - start} remain"
            )
        files.append(bytes(binary[start:offset]))
    return files


def _decode_files(data: Sequence[Any]) -> list[bytes]:
    files = []
    for index, text in enumerate(data):
        if not isinstance(text, str):
            raise InvalidParameter(
                f"file {index} must be a base64 string, not {reprlib.repr(text)}"
            )
        try:
            files.append(base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError) as error:
            raise InvalidParameter(
                f"file {index} is not base64: {error}; starts with {text[:20]!r}"
            ) from error
    return files


def _read_pixels(shape: Sequence[int], data: memoryview | Sequence[Any]) -> UInt8:
    if len(shape) != 3 or shape[2] != 3:
        raise InvalidParameter(f"the shape of a UINT8 'image' must be [H, W, 3], not {list(shape)}")
    if isinstance(data, memoryview):
        pixels: UInt8 = np.frombuffer(data, np.uint8)
    else:
        pixels = _read_numbers(shape, data)
    if pixels.size != shape[0] * shape[1] * 3:
        raise InvalidParameter(f"the shape {list(shape)} does not match {pixels.size} numbers")
    return pixels.reshape(shape)


def _read_numbers(shape: Sequence[int], data: Sequence[Any]) -> UInt8:
    """Pixels [H * W * 3] from a flat list, or from one nested as the shape."""
    try:
        if isinstance(data[0], list):
            nested = (len(data), {len(row) for row in data}, {len(p) for row in data for p in row})
            if nested != (shape[0], {shape[1]}, {shape[2]}):
                raise InvalidParameter(f"the nested lists do not have the shape {list(shape)}")
            data = list(chain.from_iterable(chain.from_iterable(data)))
        return np.frombuffer(bytes(data), np.uint8)
    except (IndexError, TypeError, ValueError) as error:
        raise InvalidParameter(
            f"a UINT8 'image' must have integers 0..255, not {reprlib.repr(data)}"
        ) from error
