"""Typed mixed-precision graphs: fp16 or bf16 for convolutions, float32 where precision matters.

A strongly typed engine (TensorRT 11) takes the precision of every value from the graph. The rule:

- low precision: convolutions and the operators between them, up to the mask probabilities;
- float32: values that do not depend on a convolution (input normalisation, coordinates, scales of
  a resize), the statistics of group normalisation, and values used only for the scores: the
  category logits including their convolution, sigmoid and points NMS, the ranking, area and sum of
  a mask. In float16 an area overflows above 65504 pixels and is rounded above 2048; bfloat16
  logits have ties that points NMS cannot resolve.

Casts are inserted only at the boundaries, at most one per value and type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper, shape_inference, version_converter

from export.errors import GraphError
from export.onnx_graph import check_graph

LowPrecision = Literal["fp16", "bf16"]
FLOAT = int(TensorProto.FLOAT)
MASKS = "mask_probs"
CONVOLUTIONS = frozenset({"Conv", "DeformConv"})
STATISTICS = frozenset({"InstanceNormalization", "GroupNormalization"})
LOOKUPS = frozenset({"Gather", "GatherND"})
"""Applied to a weight, in the vanilla head: the candidates' rows of the last convolution."""
TYPE_INDEPENDENT = frozenset({"Shape", "Size"})
"""Operators that read only the shape of their input, so no cast is needed."""


@dataclass(frozen=True)
class LowType:
    """A low-precision type.

    Attributes:
        elem_type: Its `TensorProto` data type.
        least_opset: First opset in which all operators of our graphs support it.
    """

    elem_type: int
    least_opset: int


LOW_TYPES: dict[LowPrecision, LowType] = {
    "fp16": LowType(int(TensorProto.FLOAT16), 18),
    "bf16": LowType(int(TensorProto.BFLOAT16), 22),
}


def lower_precision(graph: bytes, precision: LowPrecision) -> bytes:
    """Converts a float32 graph to a typed low-precision graph.

    Inputs, `scores` and `labels` keep their types; `mask_probs` becomes low precision, which
    halves the memory traffic of postprocessing on a GPU.

    Args:
        graph: From `build_onnx`.
        precision: fp16 or bf16.

    Raises:
        GraphError: A weight exceeds the type's range, or the result is invalid.
    """
    low = LOW_TYPES[precision]
    model = onnx.load_from_string(graph)
    opset = max(find_opset(model), low.least_opset)
    if opset > find_opset(model):
        model = version_converter.convert_version(model, opset)
        model.graph.ClearField("value_info")  # added by the converter, with the float32 types
    lowered = _Lowering(model, low.elem_type).run()
    check_graph(lowered, opset)
    return bytes(lowered.SerializeToString(deterministic=True))


def find_opset(model: onnx.ModelProto) -> int:
    """The opset version of ONNX's default domain."""
    return next(int(o.version) for o in model.opset_import if not o.domain)


def find_values(model: onnx.ModelProto, elem_type: int) -> set[str]:
    """Names of all values of a type, weights included.

    Raises:
        GraphError: The graph's types are inconsistent.
    """
    try:
        typed = shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except shape_inference.InferenceError as error:
        raise GraphError(f"the types of the graph cannot be inferred: {error}") from error
    values = (*typed.graph.input, *typed.graph.value_info, *typed.graph.output)
    found = {v.name for v in values if v.type.tensor_type.elem_type == elem_type}
    return found | {t.name for t in typed.graph.initializer if t.data_type == elem_type}


def choose_low_values(model: onnx.ModelProto) -> set[str]:
    """Outputs of nodes that become low precision by the rule in the module's docstring.

    Args:
        model: A float32 graph.
    """
    nodes = list(model.graph.node)
    floats = find_values(model, FLOAT)
    weights = {weight.name for weight in model.graph.initializer}
    from_pixels: set[str] = set()  # values that depend on a convolution or its weights
    for node in nodes:
        starts = node.op_type in CONVOLUTIONS
        starts |= node.op_type in LOOKUPS and node.input[0] in weights
        if starts or from_pixels.intersection(node.input):
            from_pixels.update(floats.intersection(node.output))
    to_pixels = {MASKS}  # values that a convolution or the masks depend on
    for node in reversed(nodes):
        if node.op_type in CONVOLUTIONS or to_pixels.intersection(node.output):
            to_pixels.update(floats.intersection(node.input))
    statistics = {name for n in nodes if n.op_type in STATISTICS for name in n.output}
    return (from_pixels & to_pixels) - statistics


def find_typed_inputs(node: NodeProto, opset: int) -> list[int]:
    """Positions of inputs that must have the same type as the first output.

    Not all do: the scales of a Resize, for example, are always float32.
    """
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    formal = [parameter.type_str for parameter in schema.inputs]
    # The last formal parameter may be variadic.
    actual = [formal[min(i, len(formal) - 1)] for i in range(len(node.input))]
    return [i for i, type_str in enumerate(actual) if type_str == schema.outputs[0].type_str]


def set_cast_type(node: NodeProto, elem_type: int) -> None:
    """Sets the output type of a Cast."""
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("to", elem_type))


class _Lowering:
    """Rewrites the nodes of a copy of a float32 graph in one pass."""

    def __init__(self, model: onnx.ModelProto, low: int) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.low, self.opset = low, find_opset(model)
        self.floats = find_values(model, FLOAT)
        self.low_values = choose_low_values(model)
        self.weights = {t.name: t for t in self.model.graph.initializer}
        self.low_weights: dict[str, TensorProto] = {}
        self.casts: dict[str, str] = {}  # value -> its cast to the other precision
        self.nodes: list[NodeProto] = []

    def run(self) -> onnx.ModelProto:
        """The typed graph."""
        graph = self.model.graph
        for node in graph.node:
            self._add(node)
        del graph.node[:]
        graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input}
        weights = (*self.weights.values(), *self.low_weights.values())
        kept = [weight for weight in weights if weight.name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        for output in graph.output:
            if output.name in self.low_values:
                output.type.tensor_type.elem_type = self.low
        return self.model

    def _add(self, node: NodeProto) -> None:
        lowered = node.output[0] in self.low_values
        if lowered and node.op_type == "Cast":
            set_cast_type(node, self.low)
        if node.op_type not in TYPE_INDEPENDENT:
            typed = find_typed_inputs(node, self.opset) if lowered else range(len(node.input))
            for position in typed:
                if node.input[position] in self.floats:
                    node.input[position] = self._cast_value(node.input[position], lowered)
        self.nodes.append(node)

    def _cast_value(self, name: str, lowered: bool) -> str:
        """Name of a float value in the wanted precision; adds a Cast if there is none yet."""
        if lowered and name in self.weights:
            return self._lower_weight(name)
        if lowered == (name in self.low_values):
            return name
        if name not in self.casts:
            wanted, suffix = (self.low, "low") if lowered else (FLOAT, "fp32")
            self.casts[name] = f"{name}_{suffix}"
            cast = helper.make_node("Cast", [name], [self.casts[name]], f"cast_{name}", to=wanted)
            self.nodes.append(cast)
        return self.casts[name]

    def _lower_weight(self, name: str) -> str:
        if name not in self.low_weights:
            values = numpy_helper.to_array(self.weights[name])
            with np.errstate(over="ignore"):
                rounded = values.astype(helper.tensor_dtype_to_np_dtype(self.low))
            if not np.isfinite(rounded.astype(np.float32)).all():
                largest = float(np.abs(values).max())
                raise GraphError(f"{name} contains {largest:.6g}, too large for the low precision")
            self.low_weights[name] = numpy_helper.from_array(rounded, f"{name}_low")
        return self.low_weights[name].name
