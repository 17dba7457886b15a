from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest

from service.http.oip.schemas import OUTPUTS, InferResponse, OutputName
from service.http.oip.write import build_body, build_tensors

RLE = {"size": [9, 8], "counts": "0\\1"}


def instance(score: float, category_id: int) -> dict[str, Any]:
    bbox = [1, 2, 3, 4]
    return {"score": score, "category_id": category_id, "bbox": bbox, "segmentation": RLE}


ENTRIES: list[dict[str, Any]] = [
    {"width": 8, "height": 9, "instances": [instance(0.736223, 10), instance(0.5, 20)]},
    {"error": {"code": "corrupt_image", "message": "it is cut"}},
    {"width": 1, "height": 2, "instances": [], "warnings": [{"code": "a", "message": "b"}] * 2},
    {"width": 5, "height": 6, "instances": [instance(0.25, 30)]},
]
EXPECTED: dict[OutputName, tuple[list[int], list[Any]]] = {
    "scores": ([3], [0.736223, 0.5, 0.25]),
    "category_ids": ([3], [10, 20, 30]),
    "bbox": ([3, 4], [1.0, 2.0, 3.0, 4.0] * 3),
    "rle": ([3], ["0\\1"] * 3),
    "image_index": ([3], [0, 0, 3]),
    "image_hw": ([4, 2], [9, 8, 0, 0, 2, 1, 6, 5]),
    "error": ([4], ["", "corrupt_image: it is cut", "", ""]),
    "warnings": ([4], ["", "", "a: b\na: b", ""]),
}


def test_json_data_are_flat_and_of_the_types_in_the_metadata() -> None:
    tensors = build_tensors(ENTRIES)
    body, json_bytes = build_body({"id": "a"}, tensors, dict.fromkeys(OUTPUTS, False))
    assert json_bytes is None
    answer = json.loads(body)
    assert answer["id"] == "a"
    found = {t["name"]: (t["shape"], t["data"]) for t in answer["outputs"]}
    assert found == EXPECTED
    assert {t["name"]: t["datatype"] for t in answer["outputs"]} == {
        name: metadata.datatype for name, metadata in OUTPUTS.items()
    }
    InferResponse.model_validate({**answer, "model_name": "m", "model_version": "1"})


@pytest.mark.parametrize("name", ["scores", "category_ids", "bbox", "image_index", "image_hw"])
def test_numbers_are_little_endian(name: OutputName) -> None:
    body, json_bytes = build_body({}, build_tensors(ENTRIES), {name: True})
    assert json_bytes is not None
    (tensor,) = json.loads(body[:json_bytes])["outputs"]
    assert "data" not in tensor
    assert tensor["parameters"]["binary_data_size"] == len(body) - json_bytes
    kind = {"FP32": "<f4", "INT64": "<i8"}[tensor["datatype"]]
    values = np.frombuffer(body, kind, offset=json_bytes)
    assert values.tolist() == pytest.approx(EXPECTED[name][1])


def test_strings_are_prefixed_with_their_length() -> None:
    body, json_bytes = build_body({}, build_tensors(ENTRIES), {"rle": True})
    assert body[json_bytes:] == (struct.pack("<I", 3) + b"0\\1") * 3


def test_binary_outputs_are_in_the_order_of_the_json() -> None:
    outputs: dict[OutputName, bool] = {"image_index": True, "error": False, "scores": True}
    body, json_bytes = build_body({}, build_tensors(ENTRIES), outputs)
    assert json_bytes is not None
    described = json.loads(body[:json_bytes])["outputs"]
    assert [tensor["name"] for tensor in described] == ["image_index", "error", "scores"]
    assert np.frombuffer(body[json_bytes : json_bytes + 24], "<i8").tolist() == [0, 0, 3]
    assert np.frombuffer(body[json_bytes + 24 :], "<f4").tolist()[1:] == [0.5, 0.25]


def test_empty_outputs_keep_their_shapes() -> None:
    tensors = build_tensors([{"width": 3, "height": 2, "instances": []}])
    body, _ = build_body({}, tensors, dict.fromkeys(OUTPUTS, False))
    shapes = {t["name"]: t["shape"] for t in json.loads(body)["outputs"]}
    assert shapes["bbox"] == [0, 4]
    assert shapes["scores"] == shapes["rle"] == shapes["image_index"] == [0]
    assert (shapes["image_hw"], shapes["error"]) == ([1, 2], [1])
