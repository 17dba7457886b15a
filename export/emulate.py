"""A typed low-precision graph as a float32 graph that rounds where the engine would round.

ONNX Runtime's CPU provider has few low-precision operators. Those of bfloat16 it refuses; a float16
graph it runs, but in float32 from end to end, so that nothing is ever rounded and nothing
overflows. Here every low-precision result is rounded to its type and widened again: products are
summed in float32 and the sum is rounded once, as tensor cores do it. An engine that fuses
operators rounds less often.
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
"""Their results are values that they were given, which are rounded already."""


def emulate(graph: bytes, precision: LowPrecision) -> bytes:
    """A float32 graph that computes what the typed graph says.

    Args:
        graph: Of `lower_precision`.
        precision: Its precision.

    Returns:
        A graph with the inputs and outputs of the float32 one.
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
    """A node whose low-precision results are rounded; all its values are float32."""
    emulated = NodeProto()
    emulated.CopyFrom(node)
    if node.op_type == "Cast" and node.input[0] in low_values and node.output[0] not in low_values:
        return [emulated]  # from float32, as it is here, to float32
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
