"""Tensors are found in a message without protobuf, and nothing in it can be too much."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from service.errors import BodyTooLarge, InvalidParameter, InvalidRequest
from service.grpc.wire import (
    MAX_FIELDS,
    MAX_INPUTS,
    MAX_REST_BYTES,
    read_fields,
    read_files,
    read_uints,
    split_request,
)

MIB = 2**20


def contents_of(**fields: object) -> memoryview:
    return memoryview(service_pb2.InferTensorContents(**fields).SerializeToString())


def test_a_request_comes_apart() -> None:
    sent = service_pb2.ModelInferRequest(model_name="m", model_version="3", id="i")
    sent.parameters["p"].double_param = 0.25
    tensor = sent.inputs.add(name="image", datatype="BYTES", shape=[2])
    tensor.contents.bytes_contents.extend([b"first", b""])
    sent.outputs.add(name="rle")
    sent.raw_input_contents.append(b"\x00" * 1000)
    split = split_request(sent.SerializeToString())
    assert [bytes(raw) for raw in split.raw] == [b"\x00" * 1000]
    (contents,) = split.contents
    assert contents is not None
    assert read_files(contents, 5) == [b"first", b""]
    rest = service_pb2.ModelInferRequest.FromString(split.rest)
    del sent.raw_input_contents[:]
    del sent.inputs[:]
    assert rest == sent
    (own,) = split.inputs
    read = service_pb2.ModelInferRequest.InferInputTensor.FromString(own)
    assert (read.name, read.datatype, list(read.shape)) == ("image", "BYTES", [2])
    assert not read.HasField("contents")


@given(st.lists(st.integers(0, 255)))
def test_packed_numbers(values: list[int]) -> None:
    assert read_uints(contents_of(uint_contents=values)).tolist() == values


@pytest.mark.parametrize("value", [256, 300, 383, 384, 511, 512, 16_384, 2**32 - 1])
@pytest.mark.parametrize("around", [[], [0, 255]])
def test_a_number_above_255_is_refused(value: int, around: list[int]) -> None:
    with pytest.raises(InvalidParameter, match=r"integers 0\.\.255"):
        read_uints(contents_of(uint_contents=[*around, value, *around]))


def test_numbers_without_an_end_are_refused() -> None:
    with pytest.raises(InvalidParameter, match="not all of them are"):
        read_uints(memoryview(b"\x22\x02\x05\x85"))


@pytest.mark.parametrize(
    ("contents", "name"),
    [
        (contents_of(int_contents=[1]), "int_contents"),
        (contents_of(fp32_contents=[1.0]), "fp32_contents"),
        (contents_of(bytes_contents=[b"x"]), "bytes_contents"),
        (memoryview(b"\x20\x05"), "uint_contents"),  # not packed
        (memoryview(b"\x7a\x00"), "field 15"),
    ],
)
def test_other_contents_than_numbers_are_named(contents: memoryview, name: str) -> None:
    with pytest.raises(InvalidParameter, match=f"not {name}$"):
        read_uints(contents)


def test_no_more_files_are_read_than_are_needed_to_refuse_them() -> None:
    assert len(read_files(contents_of(bytes_contents=[b""] * 100), 3)) == 4
    with pytest.raises(InvalidParameter, match=r"must be bytes_contents.*not uint_contents"):
        read_files(contents_of(uint_contents=[1]), 3)


@given(st.binary(max_size=60))
@settings(max_examples=300)
def test_any_bytes_are_read_or_refused(message: bytes) -> None:
    try:
        fields = list(read_fields(memoryview(message)))
        split_request(message)
    except InvalidRequest:
        return
    assert b"".join(field.whole for field in fields) == message


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (b"\x0b", "wire type 3"),
        (b"\xff" * 10, "no end"),
        (b"\x3a\x05abc", "has 5 bytes, but only 3 remain"),
        (b"\x09abc", "has 8 bytes, but only 3 remain"),
        (b"\x50", "no end"),
    ],
)
def test_a_malformed_message_is_refused(message: bytes, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        split_request(message)


@pytest.mark.parametrize(
    "unit",
    [b"\x2a\x00", b"\x3a\x00", b"\x50\x01", b"\x22\x00", b"\x32\x00"],
    ids=["inputs", "raw", "unknown", "parameters", "outputs"],
)
def test_millions_of_empty_parts_take_no_time(unit: bytes) -> None:
    began_s = time.process_time()
    with pytest.raises(InvalidRequest, match="more than"):
        split_request(unit * (16 * MIB // len(unit)))
    assert time.process_time() - began_s < 5


def test_the_parts_of_an_input_are_counted_too() -> None:
    inside = b"\x50\x01" * (MAX_FIELDS + 1)
    with pytest.raises(InvalidRequest, match=f"more than {MAX_FIELDS} fields"):
        split_request(service_pb2.ModelInferRequest(id="i").SerializeToString() + wrap(5, inside))
    one = wrap(5, b"\x50\x01" * MAX_FIELDS)
    assert len(split_request(one * MAX_INPUTS).inputs) == MAX_INPUTS
    with pytest.raises(InvalidRequest, match=f"more than {MAX_INPUTS} inputs"):
        split_request(one * (MAX_INPUTS + 1))


def wrap(number: int, content: bytes) -> bytes:
    size, prefix = len(content), bytearray([number << 3 | 2])
    while size > 0x7F:
        prefix.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*prefix, size]) + content


def test_what_is_no_tensor_is_bounded() -> None:
    most = wrap(3, b"x" * (MAX_REST_BYTES - 4))
    assert split_request(most + wrap(7, b"y" * MIB)).rest == most
    with pytest.raises(BodyTooLarge, match=f"has {MAX_REST_BYTES + 1} bytes"):
        split_request(wrap(3, b"x" * (MAX_REST_BYTES - 3)))
    with pytest.raises(BodyTooLarge):
        split_request(wrap(5, wrap(1, b"x" * MAX_REST_BYTES)))


def test_contents_are_given_once() -> None:
    with pytest.raises(InvalidRequest, match="more than once"):
        split_request(wrap(5, wrap(5, b"") + wrap(5, b"")))


def test_large_pixels_stay_where_they_are() -> None:
    pixels = np.arange(3000, dtype=np.uint8)
    message = wrap(7, pixels.tobytes())
    (raw,) = split_request(message).raw
    assert raw.obj is message
    assert (np.frombuffer(raw, np.uint8) == pixels).all()
