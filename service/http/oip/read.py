"""Parses the body of an infer request.

The body is JSON; or Inference-Header-Content-Length bytes of JSON followed by binary input data.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
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
from service.http.explain import explain_errors
from service.http.oip.data import DataArray, decode_files, decode_pixels, find_data
from service.http.oip.schemas import OUTPUTS, InferInput, InferParameters, InferRequest, OutputName

MAX_JSON_BYTES = 64 * 1024
"""Of the JSON without the array `data`."""
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
        BodyTooLarge: The JSON without `data` has more than `MAX_JSON_BYTES`.
    """
    if not body:
        raise EmptyBody("the body is empty, expected the protocol's JSON")
    if header_length is not None and header_length > len(body):
        raise InvalidRequest(
            f"Inference-Header-Content-Length is {header_length}, but the body has "
            f"{len(body)} bytes"
        )
    text = body[:header_length]
    data = find_data(text, MAX_JSON_BYTES)  # after more there is too much other JSON
    request = _read_json(text, data)
    binary = memoryview(body)[len(text) :]
    parameters = request.parameters or InferParameters()
    images = _read_images(request.inputs[0], data, binary, max_images)
    return InferCall(request.id, images, parameters, choose_outputs(request, parameters))


def choose_outputs(request: InferRequest, parameters: InferParameters) -> dict[OutputName, bool]:
    """The outputs that a request asks for, in their order, and whether each is to be binary."""
    default = parameters.binary_data_output
    if not request.outputs:
        return dict.fromkeys(OUTPUTS, default)
    chosen = {}
    for output in request.outputs:
        own = None if output.parameters is None else output.parameters.binary_data
        chosen[output.name] = default if own is None else own
    return chosen


def _read_json(text: bytes, data: DataArray | None) -> InferRequest:
    """The request; an array `data` that was found is empty in it."""
    size = len(text) if data is None else len(text) - (data.end - data.start)
    if size > MAX_JSON_BYTES:
        raise BodyTooLarge(
            f"the JSON without 'data' has {size} bytes, the limit is {MAX_JSON_BYTES}"
        )
    if data is not None:
        text = text[: data.start] + b"[]" + text[data.end :]
    try:
        content = orjson.loads(text)
        json.loads(text.decode(), object_pairs_hook=_refuse_repeated)  # orjson takes the last
        return validate_request(content)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the {len(text)} bytes of JSON are invalid: {error}") from error


def validate_request(content: Any) -> InferRequest:
    """A request from plain values.

    Raises:
        InvalidParameter: Names each field that is wrong.
    """
    try:
        return InferRequest.model_validate(content)
    except ValidationError as error:
        raise InvalidParameter(explain_errors(error.errors(include_url=False), "field")) from error


def _refuse_repeated(members: list[tuple[str, Any]]) -> None:
    seen = set()
    for name, _ in members:
        if name in seen:
            raise InvalidParameter(f"the field {name!r} is given more than once")
        seen.add(name)


def _read_images(
    tensor: InferInput, data: DataArray | None, binary: memoryview, max_images: int
) -> Sequence[bytes | UInt8]:
    size = None if tensor.parameters is None else tensor.parameters.binary_data_size
    if (size is None) == (tensor.data is None):
        found = "neither" if size is None else "both"
        raise InvalidRequest(f"the input 'image' must have data or binary_data_size, not {found}")
    if len(binary) != (size or 0):
        raise InvalidRequest(
            f"binary_data_size is {size or 0}, but {len(binary)} bytes follow the JSON"
        )
    if tensor.data is None:
        data = None
    elif data is None or tensor.data:  # what was cut out was not the input's
        raise InvalidRequest(
            "the input's array must be the first member named 'data', written without escapes"
        )
    if data is None:
        return read_binary(tensor, binary, max_images)
    if tensor.datatype == "UINT8":
        _check_pixels(tensor.shape)
        return [decode_pixels(data, tensor.shape)]
    count = count_files(tensor.shape, max_images)
    files = decode_files(data)
    check_files(files, count)
    return files


def read_binary(tensor: InferInput, binary: memoryview, max_images: int) -> Sequence[bytes | UInt8]:
    """The images of an input from its binary data.

    Raises:
        InvalidRequest, InvalidParameter, TooManyImages: The data do not fit the shape.
    """
    if tensor.datatype == "UINT8":
        return [read_pixels(tensor.shape, np.frombuffer(binary, np.uint8))]
    return _split_files(binary, count_files(tensor.shape, max_images))


def count_files(shape: Sequence[int], max_images: int) -> int:
    """The number of files in a BYTES input.

    Raises:
        InvalidParameter, TooManyImages
    """
    if len(shape) != 1:
        raise InvalidParameter(f"the shape of a BYTES 'image' must be [N], not {list(shape)}")
    (count,) = shape
    if count > max_images:
        raise TooManyImages(f"a request may have at most {max_images} images, not {count}")
    return count


def check_files(files: Sequence[bytes], count: int) -> None:
    """Raises InvalidParameter if there are more or fewer files than the shape says."""
    if len(files) != count:
        raise InvalidParameter(f"the shape [{count}] does not match {len(files)} files")


def _split_files(binary: memoryview, count: int) -> list[bytes]:
    """Splits binary data of the form (length, file)*."""
    files: list[bytes] = []
    offset = 0
    for index in range(count):
        start = offset + _LENGTH.size
        if start > len(binary):
            raise InvalidRequest(
                f"the binary data ends inside a length field, after {index} of {count} files"
            )
        (length,) = _LENGTH.unpack_from(binary, offset)
        offset = start + length
        if offset > len(binary):
            raise InvalidRequest(
                f"file {index} should have {length} bytes, but only {len(binary) - start} remain"
            )
        files.append(bytes(binary[start:offset]))
    if offset < len(binary):
        raise InvalidParameter(
            f"the shape [{count}] does not match the binary data: {len(binary) - offset} bytes "
            f"follow file {count - 1}"
        )
    return files


def read_pixels(shape: Sequence[int], pixels: UInt8) -> UInt8:
    """The pixels of a UINT8 input in its shape.

    Raises:
        InvalidParameter: The shape is not [H, W, 3], or does not match.
    """
    _check_pixels(shape)
    if pixels.size != shape[0] * shape[1] * 3:
        raise InvalidParameter(f"the shape {list(shape)} does not match {pixels.size} numbers")
    return pixels.reshape(shape)


def _check_pixels(shape: Sequence[int]) -> None:
    if len(shape) != 3 or shape[2] != 3:
        raise InvalidParameter(f"the shape of a UINT8 'image' must be [H, W, 3], not {list(shape)}")
