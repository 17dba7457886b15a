"""What a ModelInferRequest asks for, and how it is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from service.errors import (
    EmptyBody,
    InvalidParameter,
    InvalidRequest,
    ServiceError,
    TooManyImages,
    UnknownVersion,
)
from service.grpc.read import read_call, read_version
from service.http.oip.schemas import OUTPUTS

PIXELS = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3) * 10


def build(
    *,
    datatype: str = "BYTES",
    shape: tuple[int, ...] = (1,),
    raw: tuple[bytes, ...] = (b"\x03\0\0\0abc",),
    **fields: Any,
) -> Any:
    request = service_pb2.ModelInferRequest(**fields)
    request.inputs.add(name="image", datatype=datatype, shape=shape)
    request.raw_input_contents.extend(raw)
    return request


def test_a_request_as_tritons_client_sends_it() -> None:
    request = build(model_name="m", model_version="2", id="r", shape=(2,))
    request.raw_input_contents[0] = b"\x03\0\0\0abc\0\0\0\0"
    request.parameters["score_threshold"].double_param = 0.25
    request.parameters["priority"].uint64_param = 2
    request.parameters["timeout"].int64_param = 1500
    request.outputs.add(name="scores")
    request.outputs.add(name="rle")
    found = read_call(request.SerializeToString(), 8)
    assert (found.name, found.version, found.call.request_id) == ("m", 2, "r")
    assert list(found.call.images) == [b"abc", b""]
    parameters = found.call.parameters
    assert (parameters.score_threshold, parameters.priority) == (0.25, 2)
    assert parameters.timeout_ms == 2
    assert list(found.call.outputs) == ["scores", "rle"]
    assert not found.marks_final


def test_what_is_not_given_has_a_default() -> None:
    found = read_call(build().SerializeToString(), 8)
    assert (found.name, found.version, found.call.request_id) == (None, None, None)
    assert list(found.call.outputs) == list(OUTPUTS)


def test_pixels_and_files_may_be_contents() -> None:
    request = build(datatype="UINT8", shape=PIXELS.shape, raw=())
    request.inputs[0].contents.uint_contents.extend(PIXELS.reshape(-1).tolist())
    (image,) = read_call(request.SerializeToString(), 8).call.images
    assert (np.asarray(image) == PIXELS).all()
    raw = build(datatype="UINT8", shape=PIXELS.shape, raw=(PIXELS.tobytes(),))
    (image,) = read_call(raw.SerializeToString(), 8).call.images
    assert (np.asarray(image) == PIXELS).all()
    files = build(shape=(2,), raw=())
    files.inputs[0].contents.bytes_contents.extend([b"a", b"b"])
    assert list(read_call(files.SerializeToString(), 8).call.images) == [b"a", b"b"]


def test_a_stream_may_ask_for_the_mark_of_its_last_answer() -> None:
    request = build()
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    assert read_call(request.SerializeToString(), 8).marks_final


def change(request: Any, **values: Any) -> Any:
    for name, value in values.items():
        setattr(request.inputs[0], name, value)
    return request


def with_parameter(name: str, **value: Any) -> Any:
    request = build()
    setattr(request.parameters[name], *next(iter(value.items())))
    return request


def with_output(name: str) -> Any:
    request = build()
    request.outputs.add(name=name)
    return request


def with_classification() -> Any:
    request = build()
    request.outputs.add(name="scores").parameters["classification"].int64_param = 3
    return request


def with_shared_memory() -> Any:
    request = build(raw=())
    request.inputs[0].parameters["shared_memory_region"].string_param = "r"
    return request


def with_both() -> Any:
    request = build()
    request.inputs[0].contents.bytes_contents.append(b"abc")
    return request


@pytest.mark.parametrize(
    ("request_", "kind", "text"),
    [
        (service_pb2.ModelInferRequest(), EmptyBody, "the message is empty"),
        (service_pb2.ModelInferRequest(model_name="m"), InvalidParameter, "inputs"),
        (change(build(), name="picture"), InvalidParameter, "'picture'"),
        (change(build(), datatype="FP32"), InvalidParameter, "'FP32'"),
        (build(shape=()), InvalidParameter, r"must be \[N\]"),
        (build(shape=(0,)), InvalidParameter, "shape"),
        (build(shape=(-1,)), InvalidParameter, "-1"),
        (build(shape=(1, 1)), InvalidParameter, r"must be \[N\], not \[1, 1\]"),
        (build(shape=(9,)), TooManyImages, "at most 8 images, not 9"),
        (build(shape=(2,)), InvalidRequest, "ends inside a length field, after 1 of 2"),
        (build(raw=(b"\xff\xff\xff\xffabc",)), InvalidRequest, "should have 4294967295 bytes"),
        (build(raw=(b"\x03\0\0\0abcd",)), InvalidParameter, "does not match the binary data"),
        (build(raw=()), InvalidRequest, "no contents and 0 entries"),
        (build(raw=(b"", b"")), InvalidRequest, "no contents and 2 entries"),
        (with_both(), InvalidRequest, "its contents and 1 entries"),
        (build(datatype="UINT8", shape=(1, 1)), InvalidParameter, r"must be \[H, W, 3\]"),
        (build(datatype="UINT8", shape=(2, 2, 3)), InvalidParameter, "match 7 numbers"),
        (build(datatype="UINT8", shape=(2**40, 2**40, 3)), InvalidParameter, "does not match"),
        (with_parameter("score_threshold", double_param=2.0), InvalidParameter, "score_threshold"),
        (with_parameter("sequence_id", int64_param=1), InvalidParameter, "sequence_id"),
        (with_parameter("priority", string_param="1"), InvalidParameter, "priority"),
        (with_output("masks"), InvalidParameter, "'masks'"),
        (with_classification(), InvalidParameter, "classification"),
        (with_shared_memory(), InvalidParameter, "'shared_memory_region' is not supported"),
        (build(model_version="latest"), UnknownVersion, "'latest'"),
    ],
)
def test_a_wrong_request_is_refused_by_name(
    request_: Any, kind: type[ServiceError], text: str
) -> None:
    with pytest.raises(kind, match=text):
        read_call(request_.SerializeToString(), 8)


def test_what_is_no_message_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no ModelInferRequest"):
        read_call(b"\x0a\x01\xff" + build().SerializeToString(), 8)  # a name that is not UTF-8


def test_versions() -> None:
    assert read_version("") is None
    assert read_version("12") == 12
    for wrong in ("-1", "1.0", "٣", "1" * 5000):
        with pytest.raises(UnknownVersion, match="a version is a number"):
            read_version(wrong)
