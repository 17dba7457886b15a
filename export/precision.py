"""Typed low-precision graphs: fp16 or bf16 where the pixels go, float32 where it would hurt.

A strongly typed engine (TensorRT 11) takes the precision of every value from the file, so the file
decides. The rule follows from what a value is for:

- low precision: convolutions and what lies between them, up to the mask probabilities;
- float32: what does not come from a convolution (normalisation of the input, coordinates, the
  scales of a resize), the statistics of a group normalisation, and what serves the scores alone:
  the category logits with the convolution that makes them, their sigmoid and points NMS, the
  ranking, a mask's area and sum. An area overflows float16 above 65504 pixels and is rounded above
  2048; logits in bfloat16 tie where points NMS must tell neighbours apart.

Casts stand at the borders alone, one for each value and type.
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
"""Of a weight, in the vanilla head: the rows of the last convolution that the candidates need."""
TYPE_BLIND = frozenset({"Shape", "Size"})
"""They read no value, so its precision is all the same to them."""


@dataclass(frozen=True)
class LowType:
    """A low-precision type.

    Attributes:
        elem_type: ONNX's number of it.
        least_opset: The first in which all operators of our graphs take it.
    """

    elem_type: int
    least_opset: int


LOW_TYPES: dict[LowPrecision, LowType] = {
    "fp16": LowType(int(TensorProto.FLOAT16), 18),
    "bf16": LowType(int(TensorProto.BFLOAT16), 22),
}


def lower_precision(graph: bytes, precision: LowPrecision) -> bytes:
    """The typed low-precision graph of a float32 graph.

    Inputs, `scores` and `labels` keep their types; `mask_probs` is of the low precision, so that
    whoever reads them on a GPU reads half the bytes.

    Args:
        graph: Of `build_onnx`.
        precision: fp16 or bf16.

    Raises:
        GraphError: A weight is too large for the type, or the result is not valid.
    """
    low = LOW_TYPES[precision]
    model = onnx.load_from_string(graph)
    opset = max(find_opset(model), low.least_opset)
    if opset > find_opset(model):
        model = version_converter.convert_version(model, opset)
        model.graph.ClearField("value_info")  # the converter's; it holds the old types
    lowered = _Lowering(model, low.elem_type).run()
    check_graph(lowered, opset)
    return bytes(lowered.SerializeToString(deterministic=True))


def find_opset(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators."""
    return next(int(o.version) for o in model.opset_import if not o.domain)


def find_values(model: onnx.ModelProto, elem_type: int) -> set[str]:
    """Names of all values of a type, weights included.

    Raises:
        GraphError: The graph's types do not fit each other.
    """
    try:
        typed = shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except shape_inference.InferenceError as error:
        raise GraphError(f"the types of the graph cannot be inferred: {error}") from error
    values = (*typed.graph.input, *typed.graph.value_info, *typed.graph.output)
    found = {v.name for v in values if v.type.tensor_type.elem_type == elem_type}
    return found | {t.name for t in typed.graph.initializer if t.data_type == elem_type}


def choose_low_values(model: onnx.ModelProto) -> set[str]:
    """Values that nodes may give in low precision, by the rule at the top.

    Args:
        model: Float32.
    """
    nodes = list(model.graph.node)
    floats = find_values(model, FLOAT)
    weights = {weight.name for weight in model.graph.initializer}
    from_pixels: set[str] = set()  # values with a convolution, or its weights, behind them
    for node in nodes:
        starts = node.op_type in CONVOLUTIONS
        starts |= node.op_type in LOOKUPS and node.input[0] in weights
        if starts or from_pixels.intersection(node.input):
            from_pixels.update(floats.intersection(node.output))
    to_pixels = {MASKS}  # values that a convolution or the masks are made of
    for node in reversed(nodes):
        if node.op_type in CONVOLUTIONS or to_pixels.intersection(node.output):
            to_pixels.update(floats.intersection(node.input))
    statistics = {name for n in nodes if n.op_type in STATISTICS for name in n.output}
    return (from_pixels & to_pixels) - statistics


def find_typed_inputs(node: NodeProto, opset: int) -> list[int]:
    """Positions of the inputs that must have the type of the first output.

    The scales of a Resize, for example, are float32 whatever the type of its image.
    """
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    formal = [parameter.type_str for parameter in schema.inputs]
    given = [formal[min(i, len(formal) - 1)] for i in range(len(node.input))]  # the last repeats
    return [i for i, type_str in enumerate(given) if type_str == schema.outputs[0].type_str]


def set_cast_type(node: NodeProto, elem_type: int) -> None:
    """Makes a Cast give another type."""
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("to", elem_type))


class _Lowering:
    """One pass over the nodes of a copy of a float32 graph."""

    def __init__(self, model: onnx.ModelProto, low: int) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.low, self.opset = low, find_opset(model)
        self.floats = find_values(model, FLOAT)
        self.low_values = choose_low_values(model)
        self.weights = {t.name: t for t in self.model.graph.initializer}
        self.low_weights: dict[str, TensorProto] = {}
        self.casts: dict[str, str] = {}  # a value -> its name in the other precision
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
        if node.op_type not in TYPE_BLIND:
            typed = find_typed_inputs(node, self.opset) if lowered else range(len(node.input))
            for position in typed:
                if node.input[position] in self.floats:
                    node.input[position] = self._name_of(node.input[position], lowered)
        self.nodes.append(node)

    def _name_of(self, name: str, lowered: bool) -> str:
        """What a float value is called in the precision that its reader wants."""
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
                raise GraphError(f"{name} holds {largest:.6g}, too large for the low precision")
            self.low_weights[name] = numpy_helper.from_array(rounded, f"{name}_low")
        return self.low_weights[name].name
