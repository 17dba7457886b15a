"""A tiny real ONNX model that honours the graph contract: it finds red, green and blue regions.

Each colour channel is one candidate: its mask is the channel's brightness at a stride of 4, its
score the mean brightness inside (> 0.5). A channel without a bright region is an empty slot.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from numpy.typing import NDArray
from PIL import Image

CLASSES = ("red", "green", "blue")
TILE_PX = 64
SCALE = 2.0
STRIDE = 4
POISON = 7
"""A poisonable model fails on a batch in which any canvas starts with this much red."""

GRAPH = """
<ir_version: 9, opset_import: ["" : 18]>
blobs (uint8[B, H, W, 3] images, int64[B, 2] valid_hw)
   => (float[B, K] scores, int64[B, K] labels, float[B, K, h, w] mask_probs)
{
   full = Constant <value_float = 255.0> ()
   real = Cast <to = 1> (images)
   unit = Div (real, full)
   planes = Transpose <perm = [0, 3, 1, 2]> (unit)
   pooled = AveragePool <kernel_shape = [4, 4], strides = [4, 4]> (planes)

   zero = Constant <value_int = 0> ()
   one = Constant <value_int = 1> ()
   stride = Constant <value_int = 4> ()
   axis_1 = Constant <value_ints = [1]> ()
   axes_row = Constant <value_ints = [1, 3]> ()
   axes_column = Constant <value_ints = [1, 2]> ()
   size = Shape (pooled)
   two = Constant <value_int = 2> ()
   three = Constant <value_int = 3> ()
   rows = Gather (size, two)
   columns = Gather (size, three)
   row_range = Range (zero, rows, one)
   column_range = Range (zero, columns, one)
   row_px = Mul (row_range, stride)
   column_px = Mul (column_range, stride)
   valid_h = Gather <axis = 1> (valid_hw, zero)
   valid_w = Gather <axis = 1> (valid_hw, one)
   valid_h_column = Unsqueeze (valid_h, axis_1)
   valid_w_column = Unsqueeze (valid_w, axis_1)
   row_in = Less (row_px, valid_h_column)
   column_in = Less (column_px, valid_w_column)
   row_mask = Unsqueeze (row_in, axes_row)
   column_mask = Unsqueeze (column_in, axes_column)
   inside = And (row_mask, column_mask)
   inside_float = Cast <to = 1> (inside)
   probs = Mul (pooled, inside_float)

   half = Constant <value_float = 0.5> ()
   eps = Constant <value_float = 0.000001> ()
   spatial = Constant <value_ints = [2, 3]> ()
   bright = Greater (probs, half)
   bright_float = Cast <to = 1> (bright)
   bright_probs = Mul (probs, bright_float)
   total = ReduceSum <keepdims = 0> (bright_probs, spatial)
   area = ReduceSum <keepdims = 0> (bright_float, spatial)
   area_eps = Add (area, eps)
   mean = Div (total, area_eps)

   k = Constant <value_ints = [3]> ()
   ranked, labels = TopK <axis = 1, sorted = 1> (mean, k)
   indices = Unsqueeze (labels, spatial)
   one_1 = Constant <value_ints = [1]> ()
   size_bk = Shape <start = 0, end = 2> (probs)
   size_hw = Shape <start = 2, end = 4> (probs)
   size_all = Concat <axis = 0> (size_bk, size_hw)
   indices_all = Expand (indices, size_all)
   mask_probs = GatherElements <axis = 1> (probs, indices_all)
POISON
}
"""
_HEALTHY = "   scores = Identity (ranked)"
_POISONED = """
   poison = Constant <value_int = 7> ()
   empty = Constant <value_floats = [0.0]> ()
   pixels = Cast <to = 7> (images)
   first_row = Gather <axis = 1> (pixels, zero)
   first = Gather <axis = 1> (first_row, zero)
   first_red = Gather <axis = 1> (first, zero)
   hit = Equal (first_red, poison)
   hit_int = Cast <to = 7> (hit)
   any_hit = ReduceMax <keepdims = 0> (hit_int)
   nothing = Gather (empty, any_hit)
   scores = Add (ranked, nothing)
"""


def build_graph(*, poisonable: bool = False) -> bytes:
    """The graph, serialised."""
    text = GRAPH.replace("POISON", _POISONED if poisonable else _HEALTHY)
    model = onnx.parser.parse_model(text)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def build_typed_graph(mask_type: int) -> bytes:
    """The blob graph with masks in another type."""
    model = onnx.load_from_string(build_graph())
    graph = model.graph
    (node,) = [n for n in graph.node if "mask_probs" in n.output]
    node.output[0] = "mask_probs_float"
    graph.node.append(
        onnx.helper.make_node("Cast", ["mask_probs_float"], ["mask_probs"], to=mask_type)
    )
    graph.output[2].type.tensor_type.elem_type = mask_type
    return bytes(model.SerializeToString())


def model_config(graph: bytes, name: str = "blobs", version: int = 1) -> dict[str, Any]:
    """config.json of the model as a dictionary."""
    resize = {"rule": "tile", "scale": SCALE, "tile_hw": [TILE_PX, TILE_PX], "overlap_px": 16}
    return {
        "schema_version": 1,
        "name": name,
        "task": "segmentation",
        "description": "finds red, green and blue regions",
        "input": {"resize": resize, "contrast": None},
        "classes": [{"category_id": 10 * (i + 1), "name": c} for i, c in enumerate(CLASSES)],
        "candidates": len(CLASSES),
        "mask_stride": STRIDE,
        "postprocess": {
            "nms": {"kind": "matrix", "kernel": "gaussian", "sigma": 2.0},
            "update_threshold": 0.05,
            "mask_threshold": 0.5,
            "score_threshold": 0.1,
            "max_instances": 100,
        },
        "limits": {"max_batch": 8},
        "versions": {
            str(version): {
                "files": {
                    "model.onnx": {
                        "sha256": hashlib.sha256(graph).hexdigest(),
                        "bytes": len(graph),
                    }
                },
                "provenance": {"made_by": "tests"},
            }
        },
    }


def publish(
    root: Path,
    name: str = "blobs",
    *,
    version: int = 1,
    poisonable: bool = False,
    **changes: Any,
) -> Path:
    """Writes the model into a model_repo.

    Args:
        root: The model_repo; made if it is not there.
        name: The model's name and folder.
        version: Its only version.
        poisonable: See `POISON`.
        **changes: Top-level sections of config.json to replace.

    Returns:
        The model's folder.
    """
    graph = build_graph(poisonable=poisonable)
    folder = root / name
    (folder / str(version)).mkdir(parents=True)
    (folder / str(version) / "model.onnx").write_bytes(graph)
    config = {**model_config(graph, name, version), **changes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


KEEP_RATIO_INPUT = {
    "resize": {"rule": "keep_ratio", "short_side": 64, "long_side": 128, "pad_multiple": 32}
}
"""An `input` section with canvases of several shapes."""


def draw_picture(
    height: int = 48, width: int = 48, boxes: dict[str, tuple[int, int, int, int]] | None = None
) -> NDArray[np.uint8]:
    """A black picture with coloured boxes {colour: (x, y, w, h)}; default: one red box.

    Returns:
        [H, W, 3] uint8 RGB.
    """
    picture = np.zeros((height, width, 3), np.uint8)
    default = {"red": (width // 4, height // 4, width // 2, height // 2)}
    for colour, (x, y, w, h) in (default if boxes is None else boxes).items():
        picture[y : y + h, x : x + w, CLASSES.index(colour)] = 255
    return picture


def encode_picture(picture: NDArray[np.uint8], image_format: str = "PNG") -> bytes:
    """A picture as a file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, image_format)
    return buffer.getvalue()


def poisoned_picture(height: int = 48, width: int = 48) -> NDArray[np.uint8]:
    """A picture on which a poisonable model's engine fails."""
    picture = draw_picture(height, width)
    picture[:2, :2, 0] = POISON
    return picture
