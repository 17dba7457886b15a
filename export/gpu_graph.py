"""What TensorRT or the recording of CUDA graphs refuses in a graph, found before it is published.

ONNX Runtime runs the operators between a `Shape` and its uses on the host. Where a CUDA operator
then reads such a value as data, or where a size is computed on the device, it inserts a copy,
and a graph with copies cannot be recorded. `_place_on_host` follows its placement (1.20 to 1.32),
but never puts a graph's input on the host: arithmetic on pixels there would be a fault, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx
from onnx import NodeProto, TensorProto

from export.errors import GraphError
from export.precision import find_opset, find_values

GPU_FILES = frozenset({"model.onnx", "model.fp16.onnx", "model.bf16.onnx"})
"""Files of a version that GPUs run; the others are for the CPU."""
GPU_OPSETS = range(18, 23)
SIZE_OF_DATA = frozenset({"NonZero", "Unique", "Compress", "NonMaxSuppression"})
"""Operators whose output's shape depends on the values of their input."""
CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})
BROKEN = frozenset({"GroupNormalization"})
"""Operators that TensorRT computes wrongly or refuses (NVIDIA/TensorRT#4336, #4756)."""
TAKES_UINT8 = frozenset({"Cast", "Shape", "Size"})
READS_SHAPE = frozenset({"Shape", "Size"})
SMALL_ELEMENTS = 100
"""Weights up to this size may be read on the host."""
_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
HOST_INPUTS: Mapping[str, tuple[int, ...]] = {
    "Clip": (1, 2),
    "ConstantOfShape": (0,),
    "CumSum": (1,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1, 2, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Trilu": (1,),
    "Unsqueeze": (1,),
    **{f"Reduce{name}": (1,) for name in _REDUCTIONS},
}
"""Inputs that CUDA operators read on the host, by position."""
MOST_NAMED = 5


def require_gpu_graph(data: bytes) -> None:
    """Checks that a graph can be built by TensorRT and recorded as a CUDA graph.

    Raises:
        GraphError: It cannot, or is no ONNX graph; names the nodes.
    """
    try:
        model = onnx.load_from_string(data)
    except Exception as error:  # protobuf's class depends on its implementation
        raise GraphError(f"not an ONNX graph: {error}") from error
    faults = list(find_faults(model))
    if faults:
        more = f"; and {len(faults) - MOST_NAMED} more" if len(faults) > MOST_NAMED else ""
        raise GraphError(f"GPUs cannot run the graph: {'; '.join(faults[:MOST_NAMED])}{more}")


def find_faults(model: onnx.ModelProto) -> Iterator[str]:
    """What GPUs refuse in a graph, one phrase each, with the name of the node."""
    if not any(not entry.domain for entry in model.opset_import):
        yield "it has no operators of ONNX"
        return
    opset = find_opset(model)
    if opset not in GPU_OPSETS:
        yield f"its opset is {opset}, expected {GPU_OPSETS[0]} to {GPU_OPSETS[-1]}"
    for node in model.graph.node:
        if node.op_type in SIZE_OF_DATA:
            yield f"{_name(node)} has an output whose size depends on the data"
        elif node.op_type in CONTROL_FLOW:
            yield f"{_name(node)} is control flow"
        elif node.op_type in BROKEN:
            yield f"{_name(node)} is not reliable in TensorRT, a lower opset decomposes it"
    pixels = find_values(model, TensorProto.UINT8)
    for node in model.graph.node:
        used = pixels.intersection((*node.input, *node.output))
        if used and node.op_type not in TAKES_UINT8:
            yield f"{_name(node)} computes with uint8 ({', '.join(sorted(used))})"
    yield from find_copies(model)


def find_copies(model: onnx.ModelProto) -> Iterator[str]:
    """Copies between host and device that ONNX Runtime would insert, one phrase each."""
    host, known = _place_on_host(model)
    for node in model.graph.node:
        if node.op_type in READS_SHAPE or host.issuperset(node.output):
            continue
        on_host = HOST_INPUTS.get(node.op_type, ())
        for position, value in enumerate(node.input):
            if value in host and position not in on_host:
                yield f"{_name(node)} reads {value}, which is computed on the host"
            elif value and position in on_host and value not in host and value not in known:
                yield f"{_name(node)} needs {value} on the host, it is computed on the device"


def _place_on_host(model: onnx.ModelProto) -> tuple[set[str], set[str]]:
    """Values that are on the host, and small constants, which are on both sides."""
    graph = model.graph
    halves = find_values(model, TensorProto.FLOAT16) | find_values(model, TensorProto.BFLOAT16)
    known = {t.name for t in graph.initializer if _count(t) <= SMALL_ELEMENTS}
    known |= {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    host: set[str] = set()
    for node in graph.node:  # in topological order
        on_host = HOST_INPUTS.get(node.op_type, ())
        inputs = [(position, name) for position, name in enumerate(node.input) if name]
        follows = not halves.intersection(node.input) and any(name in host for _, name in inputs)
        if node.op_type in READS_SHAPE or (
            follows
            and all(
                name in known or (name in host and position not in on_host)
                for position, name in inputs
            )
        ):
            host.update(node.output)
    return host, known


def _count(tensor: TensorProto) -> int:
    count = 1
    for side in tensor.dims:
        count *= side
    return count


def _name(node: NodeProto) -> str:
    return f"{node.op_type} {node.name or '/'.join(node.output)!r}"
