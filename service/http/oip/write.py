"""Serialises an infer response: JSON, then the data of the outputs requested as binary.

Symbols: N images of the request, n instances of all of them together.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import orjson

from pipeline.types import Float32, Int64
from service.http.oip.schemas import OUTPUTS, OutputName

_LENGTH = struct.Struct("<I")
Values = Float32 | Int64 | list[str]


def build_tensors(entries: Sequence[Mapping[str, Any]]) -> dict[OutputName, Values]:
    """The output tensors of a request.

    Args:
        entries: One `service.http.schemas.ImageResult` per image.

    Returns:
        Values in the shape of the metadata. A failed image has no instances, the size 0 x 0 and
        a non-empty `error`.
    """
    found = [entry.get("instances") or [] for entry in entries]
    instances = list(chain.from_iterable(found))
    errors = [entry.get("error") for entry in entries]
    return {
        "scores": np.array([i["score"] for i in instances], np.float32),
        "category_ids": np.array([i["category_id"] for i in instances], np.int64),
        "bbox": np.array([i["bbox"] for i in instances], np.float32).reshape(-1, 4),
        "rle": [i["segmentation"]["counts"] for i in instances if "segmentation" in i],
        "image_index": np.repeat(np.arange(len(found)), [len(group) for group in found]),
        "image_hw": np.array(
            [(entry.get("height", 0), entry.get("width", 0)) for entry in entries], np.int64
        ),
        "error": ["" if e is None else _describe(e) for e in errors],
        "warnings": ["\n".join(map(_describe, e.get("warnings") or [])) for e in entries],
    }


def _describe(entry: Mapping[str, str]) -> str:
    return f"{entry['code']}: {entry['message']}"


def build_body(
    answer: Mapping[str, Any],
    tensors: Mapping[OutputName, Values],
    outputs: Mapping[OutputName, bool],
) -> tuple[bytes, int | None]:
    """Serialises a response.

    Args:
        answer: The fields of the response other than `outputs`.
        tensors: From `build_tensors`.
        outputs: Requested outputs in order, and whether each is binary.

    Returns:
        The body, and the length of its JSON in bytes; None if no binary data follows.
    """
    described, binary = [], []
    for name, is_binary in outputs.items():
        values = tensors[name]
        tensor: dict[str, Any] = {
            "name": name,
            "datatype": OUTPUTS[name].datatype,
            "shape": find_shape(values),
        }
        if is_binary:
            binary.append(to_bytes(values))
            tensor["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            tensor["data"] = values if isinstance(values, list) else values.reshape(-1)
        described.append(tensor)
    text = orjson.dumps({**answer, "outputs": described}, option=orjson.OPT_SERIALIZE_NUMPY)
    return b"".join([text, *binary]), len(text) if binary else None


def find_shape(values: Values) -> list[int]:
    """The shape of an output's values."""
    return [len(values)] if isinstance(values, list) else list(values.shape)


def to_bytes(values: Values) -> bytes:
    """Little-endian numbers; strings are prefixed with their length."""
    if not isinstance(values, list):
        return values.astype(values.dtype.newbyteorder("<")).tobytes()
    encoded = [text.encode() for text in values]
    return b"".join(_LENGTH.pack(len(text)) + text for text in encoded)
