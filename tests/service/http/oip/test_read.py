from __future__ import annotations

import base64
import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.types import UInt8
from service.errors import ServiceError
from service.http.oip.read import MAX_JSON_BYTES, InferCall, read_request
from service.http.oip.schemas import OUTPUTS

PIXELS = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
FILES = [b"one file", b"", b"\x00\xff" * 100]


def build(image: dict[str, Any], binary: bytes = b"", **members: Any) -> tuple[bytes, int]:
    """A body with one input, and the length of its JSON."""
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], **image}
    text = json.dumps({"inputs": [tensor], **members}).encode()
    return text + binary, len(text)


def read(image: dict[str, Any], binary: bytes = b"", **members: Any) -> InferCall:
    return read_request(*build(image, binary, **members), max_images=4)


def pack(files: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(file)) + file for file in files)


def pixels_of(call: InferCall) -> UInt8:
    (pixels,) = call.images
    assert isinstance(pixels, np.ndarray)
    return pixels


def test_files_as_base64_and_as_binary() -> None:
    texts = [base64.b64encode(file).decode() for file in FILES]
    assert read({"shape": [3], "data": texts}).images == FILES
    binary = pack(FILES)
    parameters = {"binary_data_size": len(binary), "content_type": "ignored"}
    assert read({"shape": [3], "parameters": parameters}, binary).images == FILES


@pytest.mark.parametrize("data", [PIXELS.tolist(), PIXELS.reshape(-1).tolist()])
def test_pixels_as_nested_and_as_flat_numbers(data: list[Any]) -> None:
    call = read({"datatype": "UINT8", "shape": [2, 4, 3], "data": data})
    assert (pixels_of(call) == PIXELS).all()


def test_pixels_as_binary() -> None:
    image = {"datatype": "UINT8", "shape": [2, 4, 3], "parameters": {"binary_data_size": 24}}
    pixels = pixels_of(read(image, PIXELS.tobytes()))
    assert pixels.dtype == np.uint8
    assert (pixels == PIXELS).all()


def test_without_a_header_length_the_whole_body_is_json() -> None:
    body, _ = build({"data": ["AAAA"]})
    assert read_request(body, None, 1).images == [b"\0\0\0"]


def test_omitted_fields_have_defaults() -> None:
    call = read({"data": ["AAAA"]}, id=None, parameters=None, outputs=[])
    assert call.request_id is None
    assert call.parameters.score_threshold is None
    assert call.outputs == dict.fromkeys(OUTPUTS, False)


def test_outputs_are_chosen_and_may_be_binary() -> None:
    outputs = [{"name": "rle", "parameters": {"binary_data": False}}, {"name": "scores"}]
    parameters = {"binary_data_output": True, "score_threshold": 1, "max_instances": 7}
    call = read({"data": ["AAAA"]}, id="a", outputs=outputs, parameters=parameters)
    assert call.request_id == "a"
    assert list(call.outputs.items()) == [("rle", False), ("scores", True)]
    assert (call.parameters.score_threshold, call.parameters.max_instances) == (1, 7)


ONE = {"data": ["AAAA"]}
UINT8 = {"datatype": "UINT8", "shape": [1, 2, 3]}


@pytest.mark.parametrize(
    ("image", "members", "code", "named"),
    [
        ({**ONE, "name": "images"}, {}, "invalid_parameter", "inputs.0.name"),
        ({**ONE, "datatype": "FP32"}, {}, "invalid_parameter", "'FP32'"),
        ({**ONE, "shape": [2]}, {}, "invalid_parameter", r"\[2\] does not match 1 files"),
        ({**ONE, "shape": [0]}, {}, "invalid_parameter", "shape.0"),
        ({**ONE, "shape": ["1"]}, {}, "invalid_parameter", "shape.0"),
        ({**ONE, "shape": [1, 1]}, {}, "invalid_parameter", r"\[N\], not \[1, 1\]"),
        ({**ONE, "shape": [5]}, {}, "too_many_images", "not 5"),
        ({"data": ["%%%"]}, {}, "invalid_parameter", "file 0 is not base64.*'%%%'"),
        ({"data": ["é"]}, {}, "invalid_parameter", "not base64"),
        ({"data": [7]}, {}, "invalid_parameter", "base64 string, not 7"),
        ({"data": "AAAA"}, {}, "invalid_parameter", "data"),
        ({}, {}, "invalid_request", "neither"),
        ({**ONE, "parameters": {"binary_data_size": 0}}, {}, "invalid_request", "both"),
        ({"parameters": {"binary_data_size": 9}}, {}, "invalid_request", "is 9, but 0 bytes"),
        ({"parameters": {"binary_data_size": -1}}, {}, "invalid_parameter", "-1"),
        (ONE, {"parameters": {"score_treshold": 0.5}}, "invalid_parameter", "score_treshold"),
        (ONE, {"parameters": {"score_threshold": 2}}, "invalid_parameter", "not 2"),
        (ONE, {"parameters": {"max_instances": True}}, "invalid_parameter", "True"),
        (ONE, {"outputs": [{"name": "masks"}]}, "invalid_parameter", "'masks'"),
        (ONE, {"id": 7}, "invalid_parameter", "id"),
        (ONE, {"inputs": []}, "invalid_parameter", "inputs"),
        (ONE, {"inputs": [ONE, ONE]}, "invalid_parameter", "inputs"),
        ({**UINT8, "shape": [2, 3], "data": [0] * 6}, {}, "invalid_parameter", r"\[2, 3\]"),
        ({**UINT8, "shape": [1, 2, 4], "data": [0] * 8}, {}, "invalid_parameter", r"\[H, W, 3\]"),
        ({**UINT8, "data": [0] * 5}, {}, "invalid_parameter", "does not match 5 numbers"),
        ({**UINT8, "data": []}, {}, "invalid_parameter", "does not match 0 numbers"),
        ({**UINT8, "data": [0, 1, 2, 3, 4, 256]}, {}, "invalid_parameter", "0..255"),
        ({**UINT8, "data": [0, 1, 2, 3, 4, -1]}, {}, "invalid_parameter", "0..255"),
        ({**UINT8, "data": [0.5] * 6}, {}, "invalid_parameter", "must have integers"),
        ({**UINT8, "data": ["0"] * 6}, {}, "invalid_parameter", "must have integers"),
        ({**UINT8, "data": ["x" * 100_000, 1]}, {}, "invalid_parameter", "element 1 of 'data'"),
        ({**UINT8, "data": [[[0, 1, 2]], [[3, 4, 5]]]}, {}, "invalid_parameter", "nested"),
        ({**UINT8, "data": [[[0, 1, 2], [3, 4]]]}, {}, "invalid_parameter", "not match 5 numbers"),
        ({**UINT8, "data": [[[0, 1], [2, 3, 4, 5]]]}, {}, "invalid_parameter", "nested"),
        ({**UINT8, "data": [[0, 1, 2, 3, 4, 5]]}, {}, "invalid_parameter", "nested"),
        (
            {**UINT8, "data": [[["a", "b", "c"], [1, 2, 3]]]},
            {},
            "invalid_parameter",
            "only strings, or only numbers",
        ),
    ],
)
def test_invalid_fields_are_named(
    image: dict[str, Any], members: dict[str, Any], code: str, named: str
) -> None:
    with pytest.raises(ServiceError, match=named) as caught:
        read(image, **members)
    assert caught.value.code == code
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("binary", "named"),
    [
        (b"\x01\0\0", "ends inside a length field, after 0 of 1 files"),
        (b"\x05\0\0\0ab", "file 0 should have 5 bytes, but only 2 remain"),
        (pack([b"a", b"b"]), "5 bytes follow file 0"),
        (pack([b"a"]) + b"\0", "1 bytes follow file 0"),
        (b"", "after 0 of 1 files"),
    ],
)
def test_invalid_binary_data_is_explained(binary: bytes, named: str) -> None:
    with pytest.raises(ServiceError, match=named):
        read({"parameters": {"binary_data_size": len(binary)}}, binary)


@pytest.mark.parametrize(
    ("body", "header_length", "code"),
    [
        (b"", None, "empty_body"),
        (b"no JSON", None, "invalid_request"),
        (b'{"inputs": [}', None, "invalid_request"),
        (b"[" * 2000, None, "invalid_request"),
        (b"[]", None, "invalid_parameter"),
        (b"{}", None, "invalid_parameter"),
        (b"{}", 3, "invalid_request"),
        (b"\xff\xfe", None, "invalid_request"),
        (b"[" + b"0," * MAX_JSON_BYTES + b"0]", None, "body_too_large"),
        (b" " * MAX_JSON_BYTES + b"{}", None, "body_too_large"),
    ],
)
def test_bodies_that_violate_the_protocol(
    body: bytes, header_length: int | None, code: str
) -> None:
    with pytest.raises(ServiceError) as caught:
        read_request(body, header_length, 4)
    assert caught.value.code == code


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_mutated_body_is_parsed_or_rejected(data: st.DataObject) -> None:
    parameters = {"binary_data_size": len(pack(FILES))}
    body, length = build({"shape": [3], "parameters": parameters}, pack(FILES), id="x")
    mutated = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    start = data.draw(st.integers(0, 8))
    try:
        call = read_request(bytes(mutated)[start:], max(1, length - start), 4)
    except ServiceError:
        return
    assert len(call.images) in (1, 2, 3)


@pytest.mark.parametrize("other", [["AAAB"], [], [1]])
def test_another_array_named_data_is_not_taken_for_the_inputs(other: list[Any]) -> None:
    image = {"parameters": {"data": other}, "data": ["AAAA"]}
    with pytest.raises(ServiceError, match="first member named 'data'"):
        read(image)
    assert read({"data": ["AAAA"], "parameters": {"data": other}}).images == [b"\0\0\0"]
