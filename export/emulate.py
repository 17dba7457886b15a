"""Emulates a typed low-precision graph by a float32 graph that rounds every low-precision result.

ONNX Runtime's CPU provider has no bfloat16 operators, and runs float16 graphs in float32
throughout, without rounding or overflow. In the emulation every low-precision result is rounded to
its type and widened again: sums of products accumulate in float32 and are rounded once, as on
tensor cores. Engines that fuse operators round less often.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from export.precision import LOW_TYPES, LowPrecision, find_values, set_cast_type

SELECTING = frozenset(
    {
        *("Concat", "Expand", "Gather", "GatherElements", "GatherND", "Identity", "Reshape"),
        *("MaxPool", "Relu", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze", "Where"),
    }
)
"""Operators whose outputs are values of their inputs, which are already rounded."""


def emulate(graph: bytes, precision: LowPrecision) -> bytes:
    """The float32 emulation of a typed graph.

    Args:
        graph: From `lower_precision`.
        precision: Precision of the graph.

    Returns:
        A graph with the inputs and outputs of the original float32 graph.
    """
    model = onnx.load_from_string(graph)
    low = LOW_TYPES[precision].elem_type
    values = find_values(model, low)
    nodes = [part for node in model.graph.node for part in _emulate_node(node, values, low)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for weight in model.graph.initializer:
        if weight.data_type == low:
            rounded = numpy_helper.to_array(weight).astype(np.float32)
            weight.CopyFrom(numpy_helper.from_array(rounded, weight.name))
    for output in model.graph.output:
        if output.name in values:
            output.type.tensor_type.elem_type = TensorProto.FLOAT
    return bytes(model.SerializeToString(deterministic=True))


def _emulate_node(node: NodeProto, low_values: set[str], low: int) -> list[NodeProto]:
    """The node in float32, followed by casts that round its low-precision outputs."""
    emulated = NodeProto()
    emulated.CopyFrom(node)
    if node.op_type == "Cast" and node.input[0] in low_values and node.output[0] not in low_values:
        return [emulated]  # its input is float32 here, so it has no effect
    if node.op_type == "Cast" and node.output[0] in low_values:
        set_cast_type(emulated, TensorProto.FLOAT)
    outputs = [name for name in node.output if name in low_values]
    if not outputs or node.op_type in SELECTING:
        return [emulated]
    nodes = [emulated]
    for position, name in enumerate(node.output):
        if name in low_values:
            exact, rounded = f"{name}_exact", f"{name}_rounded"
            emulated.output[position] = exact
            nodes.append(helper.make_node("Cast", [exact], [rounded], f"round_{name}", to=low))
            nodes.append(
                helper.make_node(
                    "Cast", [rounded], [name], f"widen_{name}", to=int(TensorProto.FLOAT)
                )
            )
    return nodes
