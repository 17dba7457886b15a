"""A graph with every part that an exported one has, small enough for onnx's reference evaluator.

A convolution of stride 2, a group normalisation, coordinates, an enlarging resize back to the size
of the image, a category branch with its ranking, a mask branch, areas and maskness, the last sort.
Values have names that say what they are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from export.config_json import describe_file
from pipeline.model_config import ModelConfig

CANDIDATES = 4
MASKS = 6
GROUPS = 2


def feeds_of(image_hw: tuple[int, int], batch: int = 2) -> dict[str, Any]:
    """Random images; the sides are multiples of 8."""
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (batch, *image_hw, 3), dtype=np.uint8)
    return {"images": images, "valid_hw": np.tile(np.array(image_hw, np.int64), (batch, 1))}


def _node(op_type: str, inputs: str, outputs: str, **attributes: Any) -> NodeProto:
    names = outputs.split()
    return helper.make_node(op_type, inputs.split(), names, f"make_{names[0]}", **attributes)


def _nodes() -> list[NodeProto]:
    return [
        _node("Cast", "images", "values", to=TensorProto.FLOAT),
        _node("Transpose", "values", "pixels", perm=[0, 3, 1, 2]),
        _node("Sub", "pixels mean", "centred"),
        _node("Div", "centred deviation", "normalised"),
        _node("Conv", "normalised stem_weight", "features", strides=[2, 2], pads=[1, 1, 1, 1]),
        _node("Reshape", "features groups", "grouped"),
        _node("InstanceNormalization", "grouped ones zeros", "statistics", epsilon=1e-5),
        _node("Shape", "features", "features_shape"),
        _node("Reshape", "statistics features_shape", "restored"),
        _node("Mul", "restored gamma", "scaled"),
        _node("Add", "scaled beta", "shifted"),
        _node("Relu", "shifted", "active"),
        _node("Conv", "active category_weight", "category_logits", strides=[4, 4]),
        _node("Sigmoid", "category_logits", "category_probs"),
        _node("Reshape", "category_probs flat", "cells_probs"),
        _node("TopK", "cells_probs count", "ranked cells"),
        _node("Shape", "active", "width", start=3, end=4),
        _node("Squeeze", "width", "columns"),
        _node("Cast", "columns", "columns_float", to=TensorProto.FLOAT),
        _node("Range", "zero columns_float one", "steps"),
        _node("ReduceMax", "steps", "last_step", keepdims=0),
        _node("Div", "steps last_step", "coordinates"),
        _node("Shape", "active", "batch", start=0, end=1),
        _node("Shape", "active", "sides", start=2, end=4),
        _node("Concat", "batch single sides", "grid_shape", axis=0),
        _node("Expand", "coordinates grid_shape", "grid"),
        _node("Concat", "active grid", "joined", axis=1),
        helper.make_node("Resize", ["joined", "", "scales"], ["enlarged"], mode="linear"),
        _node("Conv", "enlarged mask_weight mask_bias", "mask_logits"),
        _node("Sigmoid", "mask_logits", "all_masks"),
        _node("Mod", "cells masks", "chosen"),
        _node("Unsqueeze", "chosen last", "chosen_index"),
        _node("GatherND", "all_masks chosen_index", "rows", batch_dims=1),
        _node("Greater", "rows half", "above"),
        _node("Cast", "above", "inside", to=TensorProto.FLOAT),
        _node("ReduceSum", "inside spatial", "area", keepdims=0),
        _node("Mul", "rows inside", "kept"),
        _node("ReduceSum", "kept spatial", "total", keepdims=0),
        _node("Max", "area one", "divisor"),
        _node("Div", "total divisor", "maskness"),
        _node("Mul", "ranked maskness", "products"),
        _node("TopK", "products count", "scores order"),
        _node("GatherElements", "chosen order", "labels", axis=1),
        _node("Unsqueeze", "order last", "order_index"),
        _node("GatherND", "rows order_index", "mask_probs", batch_dims=1),
    ]


def _weights(channels: int, full_mask: bool) -> dict[str, Any]:
    rng = np.random.default_rng(1)

    def draw(*shape: int) -> Any:
        return rng.normal(0, 1.5 / np.prod(shape[1:]) ** 0.5, shape).astype(np.float32)

    # Mask i is what lies right of a wavy line at edges[i] of the width.
    edges, slope = np.linspace(0.2, 0.7, MASKS, dtype=np.float32), np.float32(10)
    mask_weight = 0.2 * draw(MASKS, channels + 1, 1, 1)
    mask_weight[:, -1] = slope

    numbers = {
        "mean": np.full((3, 1, 1), 120, np.float32),
        "deviation": np.full((3, 1, 1), 60, np.float32),
        "stem_weight": draw(channels, 3, 3, 3),
        "ones": np.ones(GROUPS, np.float32),
        "zeros": np.zeros(GROUPS, np.float32),
        "gamma": rng.uniform(0.5, 1.5, (channels, 1, 1)).astype(np.float32),
        "beta": rng.normal(0, 0.5, (channels, 1, 1)).astype(np.float32),
        "category_weight": draw(1, channels, 1, 1),
        "mask_weight": mask_weight,
        "mask_bias": np.full(MASKS, 30, np.float32) if full_mask else -edges * slope,
        "scales": np.array([1, 1, 2, 2], np.float32),
        "half": np.array(0.5, np.float32),
        "zero": np.array(0, np.float32),
        "one": np.array(1, np.float32),
    }
    integers = {
        "groups": [0, GROUPS, -1],
        "flat": [0, -1],
        "count": [CANDIDATES],
        "single": [1],
        "masks": MASKS,
        "last": [-1],
        "spatial": [2, 3],
    }
    return {**numbers, **{n: np.array(v, np.int64) for n, v in integers.items()}}


@lru_cache
def build_graph(*, channels: int = 4, full_mask: bool = False) -> bytes:
    """The serialised float32 graph, opset 18; the masks cover all of the image if so asked."""
    dims: dict[str, tuple[int, list[str | int]]] = {
        "images": (TensorProto.UINT8, ["batch", "height", "width", 3]),
        "valid_hw": (TensorProto.INT64, ["batch", 2]),
        "scores": (TensorProto.FLOAT, ["batch", CANDIDATES]),
        "labels": (TensorProto.INT64, ["batch", CANDIDATES]),
        "mask_probs": (TensorProto.FLOAT, ["batch", CANDIDATES, "mask_height", "mask_width"]),
    }
    values = [helper.make_tensor_value_info(n, t, shape) for n, (t, shape) in dims.items()]
    weights = [numpy_helper.from_array(v, n) for n, v in _weights(channels, full_mask).items()]
    graph = helper.make_graph(_nodes(), "typed", values[:2], values[2:], weights)
    opset = helper.make_opsetid("", 18)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    return bytes(model.SerializeToString())


def build_config(graph: bytes, version: int = 1) -> ModelConfig:
    """A version of a model `typed` with this graph; its tiles are 64x64 px."""
    tile = {"rule": "tile", "scale": 1.0, "tile_hw": [64, 64], "overlap_px": 16}
    content = {
        "name": "typed",
        "version": version,
        "input": {"resize": tile},
        "classes": [{"category_id": 3 + label, "name": f"class{label}"} for label in range(MASKS)],
        "candidates": CANDIDATES,
        "mask_stride": 1,
        "postprocess": {"nms": {"kind": "matrix"}},
        "files": {"model.onnx": describe_file(graph)},
    }
    return ModelConfig.model_validate(content)
