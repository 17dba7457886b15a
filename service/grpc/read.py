"""Parses a ModelInferRequest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from pipeline.types import UInt8
from service.errors import EmptyBody, InvalidParameter, InvalidRequest, UnknownVersion
from service.grpc.messages import MESSAGES, read_parameters
from service.grpc.wire import RawRequest, read_files, read_uints, split_request
from service.http.oip.read import (
    InferCall,
    check_files,
    choose_outputs,
    count_files,
    read_binary,
    read_pixels,
    validate_request,
)
from service.http.oip.schemas import InferInput, InferParameters

_FINAL_RESPONSES = "triton_enable_empty_final_response"
"""A parameter that Triton's clients send for streams."""


@dataclass(frozen=True)
class RpcCall:
    """A parsed request.

    Attributes:
        name: The model; None: the default one.
        version: Of the model; None: the highest that is served.
        call: What it asks for.
        marks_final: Whether the answer has to say that it is the only one.
    """

    name: str | None
    version: int | None
    call: InferCall
    marks_final: bool


def parse(name: str, data: bytes) -> Any:
    """A message from its bytes.

    Args:
        name: Its class in `MESSAGES`.
        data: Serialised.

    Raises:
        InvalidRequest: It is malformed.
    """
    try:
        return MESSAGES[name].FromString(data)
    except DecodeError as error:
        raise InvalidRequest(f"the message is no {name}: {error}") from error


def read_version(text: str) -> int | None:
    """A model's version; None if the text is empty.

    Raises:
        UnknownVersion: It is no number.
    """
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise UnknownVersion(f"a version is a number, not {text[:50]!r}")
    return int(text)


def read_call(message: bytes, max_images: int) -> RpcCall:
    """Parses a request.

    Args:
        message: A serialised ModelInferRequest.
        max_images: Maximum number of images.

    Raises:
        InvalidRequest, InvalidParameter, EmptyBody, TooManyImages, UnknownVersion: The message
            names the fault.
        BodyTooLarge: It is too large without its tensors.
    """
    if not message:
        raise EmptyBody("the message is empty, expected a ModelInferRequest")
    parts = split_request(message)
    head = parse("ModelInferRequest", parts.rest)
    inputs = [parse("InferInputTensor", part) for part in parts.inputs]
    parameters = read_parameters(head.parameters)
    marks_final = parameters.pop(_FINAL_RESPONSES, False) is True
    request = validate_request(
        {
            "id": head.id or None,
            "parameters": parameters,
            "inputs": [
                {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
                for tensor in inputs
            ],
            "outputs": [
                {"name": output.name, "parameters": read_parameters(output.parameters)}
                for output in head.outputs
            ],
        }
    )
    images = _read_images(request.inputs[0], inputs[0], parts, max_images)
    outputs = choose_outputs(request, request.parameters or InferParameters())
    call = InferCall(request.id, images, request.parameters or InferParameters(), outputs)
    return RpcCall(head.model_name or None, read_version(head.model_version), call, marks_final)


def _read_images(
    tensor: InferInput, sent: Any, parts: RawRequest, max_images: int
) -> Sequence[bytes | UInt8]:
    for name in sent.parameters:
        if name.startswith("shared_memory"):
            raise InvalidParameter(f"the input's parameter {name!r} is not supported")
    (contents,) = parts.contents
    if len(parts.raw) > 1 or (contents is None) == (not parts.raw):
        raise InvalidRequest(
            "the input 'image' must have either contents or one entry of raw_input_contents, not "
            f"{'no' if contents is None else 'its'} contents and {len(parts.raw)} entries"
        )
    if contents is None:
        return read_binary(tensor, parts.raw[0], max_images)
    if tensor.datatype == "UINT8":
        return [read_pixels(tensor.shape, read_uints(contents))]
    count = count_files(tensor.shape, max_images)
    files = read_files(contents, count)
    check_files(files, count)
    return files
