"""Blob models whose engine takes its time, hangs, or asks for more memory than there is.

What happens hangs on a pixel of the image (`blob_model.POISON`), so a test chooses it by the
picture that it sends.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser

from tests.support.blob_model import GRAPH, model_config

FOR_EVER = 1 << 40
"""Rounds of about 10 us: longer than anybody waits."""
TOO_MUCH = 1 << 45
"""Floats."""

ONE_CANVAS = {
    "resize": {"rule": "keep_ratio", "short_side": 64, "long_side": 64, "pad_multiple": 64}
}
"""An `input` section with which every image becomes one canvas of one shape."""

_END = """
   poison = Constant <value_int = 7> ()
   pixels = Cast <to = 7> (images)
   first_row = Gather <axis = 1> (pixels, zero)
   first = Gather <axis = 1> (first_row, zero)
   first_red = Gather <axis = 1> (first, zero)
   hit = Equal (first_red, poison)
   hit_int = Cast <to = 7> (hit)
   any_hit = ReduceMax <keepdims = 0> (hit_int)

   batch = Gather (size, zero)
   dynamic_one = Div (batch, batch)
   base = Constant <value_int = BASE_ROUNDS> ()
   more = Constant <value_int = POISONED_ROUNDS> ()
   base_rounds = Mul (dynamic_one, base)
   more_rounds = Mul (any_hit, more)
   rounds = Add (base_rounds, more_rounds)
   side = Constant <value_ints = [64, 64]> ()
   value = Constant <value_float = 0.015625> ()
   matrix = Expand (value, side)
   go_on = Constant <value = bool {1}> ()
   powers = Loop <body = round (int64 index, bool keep, float[64, 64] x)
      => (bool keep_out, float[64, 64] y)
   {
      keep_out = Identity (keep)
      y = MatMul (x, x)
   }> (rounds, go_on, matrix)
   trace = ReduceSum <keepdims = 0> (powers)
   expected = Constant <value_float = 64.0> ()
   nought = Sub (trace, expected)

   floats = Constant <value_int = POISONED_FLOATS> ()
   wanted = Mul (any_hit, floats)
   axis_0 = Constant <value_ints = [0]> ()
   wanted_1 = Unsqueeze (wanted, axis_0)
   block = ConstantOfShape (wanted_1)
   block_sum = ReduceSum <keepdims = 0> (block)
   ranked_later = Add (ranked, nought)
   scores = Add (ranked_later, block_sum)
"""


def build_slow_graph(
    *, rounds: int = 0, poisoned_rounds: int = 0, poisoned_floats: int = 0
) -> bytes:
    """The blob graph with work in front of its scores.

    Args:
        rounds: Of a loop, in every call: about 10 us each.
        poisoned_rounds: More of them if a canvas of the batch is poisoned.
        poisoned_floats: Memory that a batch with a poisoned canvas allocates.
    """
    end = _END.replace("BASE_ROUNDS", str(rounds))
    end = end.replace("POISONED_ROUNDS", str(poisoned_rounds))
    end = end.replace("POISONED_FLOATS", str(poisoned_floats))
    model = onnx.parser.parse_model(GRAPH.replace("POISON", end))
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def build_full_graph(count: int) -> bytes:
    """A graph that finds the same instances in every image, each nearly as large as the image.

    Args:
        count: Instances, each of a class of its own, so that none suppresses another. The i-th is
            the canvas without a square that lies elsewhere in each.
    """
    masks = np.full((1, count, 40, 40), 0.9, np.float32)
    for index in range(count):
        row, column = divmod(index, 10)
        masks[0, index, 2 + 3 * row : 4 + 3 * row, 3 + 3 * column : 6 + 3 * column] = 0.1
    text = f"""
    <ir_version: 9, opset_import: ["" : 18]>
    full (uint8[B, H, W, 3] images, int64[B, 2] valid_hw)
       => (float[B, K] scores, int64[B, K] labels, float[B, K, h, w] mask_probs)
    {{
       batch = Shape <start = 0, end = 1> (images)
       rest = Constant <value_ints = [{count}]> ()
       size = Concat <axis = 0> (batch, rest)
       scores = Expand (all_scores, size)
       labels = Expand (all_labels, size)
       rest_masks = Constant <value_ints = [{count}, 40, 40]> ()
       size_masks = Concat <axis = 0> (batch, rest_masks)
       mask_probs = Expand (all_masks, size_masks)
    }}
    """
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(
        [
            onnx.numpy_helper.from_array(np.full((1, count), 0.8, np.float32), "all_scores"),
            onnx.numpy_helper.from_array(np.arange(count)[None], "all_labels"),
            onnx.numpy_helper.from_array(masks, "all_masks"),
        ]
    )
    return bytes(model.SerializeToString())


def full_config(count: int) -> dict[str, Any]:
    """Sections of config.json for `build_full_graph`."""
    resize = {"rule": "keep_ratio", "short_side": 160, "long_side": 160, "pad_multiple": 160}
    return {
        "input": {"resize": resize},
        "classes": [{"category_id": i + 1, "name": f"class {i}"} for i in range(count)],
        "candidates": count,
    }


def publish_graph(root: Path, name: str, graph: bytes, version: int = 1, **changes: Any) -> Path:
    """Writes a graph into a model_repo, as `blob_model.publish` does.

    Args:
        root: The model_repo; made if it is not there.
        name: The model's name and folder; a config.json that is there is replaced.
        graph: The version's graph.
        version: Its only version.
        **changes: Top-level sections of config.json to replace.
    """
    folder = root / name
    (folder / str(version)).mkdir(parents=True, exist_ok=True)
    (folder / str(version) / "model.onnx").write_bytes(graph)
    config = {**model_config(graph, name, version), **changes}
    unfinished = folder / ".config.json"
    unfinished.write_text(json.dumps(config), encoding="utf-8")
    unfinished.replace(folder / "config.json")
    return folder
