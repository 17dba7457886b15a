"""Early exits for the CPU: rewrites a graph to skip the masks of levels without candidates.

The mask branch of each pyramid level is moved into an ONNX `If` and runs only on the canvases of
the batch that have a candidate at that level. Later operators process only the slots used by the
fullest canvas of the batch, not all K. The operators and their inputs are unchanged, so with one
thread the candidates are bit-identical to the plain graph's; only the number of empty slots
differs. With several threads ONNX Runtime partitions a matrix product by its shape, and a batch by
threads: where a level's map is small (fewer pixels than a vanilla head has candidates, or not a
multiple of 16), the last bits may depend on the rest of the batch, as in the plain graph.
`export.exits` compares with the number of threads used for serving.

Candidates are determined by the graph's own threshold. Requests only filter the graph's
candidates, so their thresholds need not be known here.

ONNX Runtime prepacks the weights of an operator in an `If` only if they are in the same subgraph,
so weights shared between levels are copied for each level. Engines that capture or fuse whole
graphs (CUDA graphs, TensorRT) need fixed shapes and use the plain graph.

Symbols: B batch, b canvases of it with a candidate at a level, K slots, k used slots, S grid,
h w mask.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper, shape_inference

from export.errors import GraphError
from export.onnx_graph import check_graph
from export.precision import find_opset

MASKS = "mask_probs"


def add_exits(graph: bytes, mask_stride: int) -> bytes:
    """Adds early exits to a plain graph, float32 or int8.

    Args:
        graph: From `build_onnx` or `quantize`.
        mask_stride: Canvas px per mask px.

    Raises:
        GraphError: The graph does not have the expected structure, or the result is invalid.
    """
    model = onnx.load_from_string(graph)
    _Rewriter(model, mask_stride).run()
    check_graph(model, find_opset(model))
    return bytes(model.SerializeToString(deterministic=True))


class Graph:
    """Index of a graph's nodes and values.

    Attributes:
        nodes: In the model's order.
        producers: Node by name of its output.
        weights: Initializers by name.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.producers: dict[str, NodeProto] = {
            name: node for node in self.nodes for name in node.output
        }
        self.weights: dict[str, TensorProto] = {w.name: w for w in model.graph.initializer}

    def array(self, name: str) -> NDArray[np.generic] | None:
        """A weight as an array; None if the value is not a weight."""
        weight = self.weights.get(name)
        return None if weight is None else numpy_helper.to_array(weight)

    def producer(self, name: str, *op_types: str) -> NodeProto:
        """The node that produces a value.

        Raises:
            GraphError: It is not of one of these types.
        """
        node: NodeProto | None = self.producers.get(name)
        if node is None or node.op_type not in op_types:
            found = "nothing" if node is None else node.op_type
            raise GraphError(f"{name} is produced by {found}, expected {' or '.join(op_types)}")
        return node

    def consumers(self, name: str, op_type: str) -> list[NodeProto]:
        """Nodes of a type with a value as input."""
        return [node for node in self.nodes if node.op_type == op_type and name in node.input]

    def ancestors(self, names: Iterable[str], known: Collection[str] = ()) -> list[NodeProto]:
        """Nodes that values depend on, in the graph's order; the search stops at `known`.

        Args:
            names: Values.
            known: First outputs of nodes to exclude.
        """
        found: set[str] = set()
        pending = list(names)
        while pending:
            node = self.producers.get(pending.pop())
            if node is not None and node.output[0] not in found and node.output[0] not in known:
                found.add(node.output[0])
                pending += node.input
        return [node for node in self.nodes if node.output[0] in found]


@dataclass(frozen=True)
class Level:
    """The outputs of a pyramid level's mask branch.

    Attributes:
        maps: Decoupled: X and Y, [B, S, h, w] each. Vanilla: masks [B, K, h, w], valid for the
            candidates of this level.
        merge: Vanilla, except the first level: the `Where` that merges them with the masks of the
            previous levels.
    """

    maps: list[str]
    merge: NodeProto | None = None


def find_levels(graph: Graph) -> list[Level]:
    """The levels, finest first.

    Raises:
        GraphError: The masks are not computed as by this project's heads.
    """
    masks = MASKS
    while graph.producer(masks, "GatherND", "Mul", "Where").op_type == "GatherND":
        masks = graph.producers[masks].input[0]
    last = graph.producers[masks]
    if last.op_type == "Mul":
        gathers = [graph.producer(name, "GatherND") for name in last.input]
        x, y = (graph.producer(gather.input[0], "Concat") for gather in gathers)
        return [Level(list(maps)) for maps in zip(x.input, y.input, strict=True)]
    levels: list[Level] = []
    node: NodeProto | None = last
    while node is not None and node.op_type == "Where":
        _, own, masks = node.input
        levels.append(Level([own], node))
        node = graph.producers.get(masks)
    return [Level([masks]), *reversed(levels)]


def find_candidate_level(graph: Graph, num_levels: int) -> str:
    """Name of the value [B, K] with each candidate's level.

    Raises:
        GraphError: The graph has no such value.
    """
    for node in graph.nodes:
        table = graph.array(node.input[0]) if node.op_type == "GatherND" else None
        if table is None or table.ndim != 1 or table.dtype != np.int64:
            continue
        if list(np.unique(table)) == list(range(num_levels)) and (np.diff(table) >= 0).all():
            return str(node.output[0])
    raise GraphError(f"no table in the graph maps candidates to {num_levels} levels")


@dataclass
class _Branch:
    """A subgraph under construction, the body of an `If`; all names start with `prefix`."""

    prefix: str
    nodes: list[NodeProto] = field(default_factory=list)
    weights: dict[str, TensorProto] = field(default_factory=dict)

    def add(self, op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        name = self.prefix + output
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, values: object) -> str:
        name = self.prefix + name
        self.weights[name] = numpy_helper.from_array(np.array(values, np.int64), name)
        return name

    def close(self, outputs: list[str], elem_type: int) -> onnx.GraphProto:
        results = [helper.make_tensor_value_info(o, elem_type, None) for o in outputs]
        name = self.prefix.rstrip("/")
        return helper.make_graph(self.nodes, name, [], results, list(self.weights.values()))


class _Rewriter(_Branch):
    """Rewrites a model in place; as a `_Branch` it holds the new nodes of the main graph."""

    def __init__(self, model: onnx.ModelProto, mask_stride: int) -> None:
        super().__init__("exits/")
        self.model, self.mask_stride = model, mask_stride
        self.graph = Graph(model)
        typed = shape_inference.infer_shapes(model).graph.value_info
        self.dims = {v.name: list(v.type.tensor_type.shape.dim) for v in typed}

    def run(self) -> None:
        levels = find_levels(self.graph)
        level_of = find_candidate_level(self.graph, len(levels))
        ranking = next(node for node in self.graph.nodes if node.op_type == "TopK")
        thresholds = self.graph.consumers(ranking.output[0], "Greater")
        if len(thresholds) != 1:
            raise GraphError(f"the ranked scores are compared {len(thresholds)} times, not once")
        known = {node.output[0] for node in self.graph.ancestors(ranking.output)}
        self._find_mask_hw(self.graph.ancestors(levels[0].maps, known))
        regions = [self.graph.ancestors(level.maps, known) for level in levels]
        self._keep_used_slots(ranking, thresholds[0].input[1], known)
        replaced: set[str] = set()
        for number, (level, region) in enumerate(zip(levels, regions, strict=True)):
            need = self._add_need(level_of, thresholds[0].output[0], number)
            replaced.update(self._add_level(number, level, region, need))
        kept = [n for n in self.graph.nodes if not replaced.intersection(n.output)]
        _replace_nodes(self.model.graph, [*kept, *self.nodes], self.weights)

    def _find_mask_hw(self, finest: list[NodeProto]) -> None:
        """Computes the mask size from the canvas, because the finest level may be skipped."""
        maps = {name for node in finest for name in node.output}
        for node in self.graph.nodes:
            sides = {a.name: a.i for a in node.attribute} if node.op_type == "Shape" else {}
            if sides.get("start", 0) > 1 and node.input[0] in maps:
                attributes = {"start": sides["start"] - 1, "end": sides["end"] - 1}
                canvas = self.add("Shape", ["images"], node.output[0], **attributes)
                stride = self.constant("stride", [self.mask_stride])
                node.CopyFrom(
                    helper.make_node("Div", [canvas, stride], list(node.output), name=node.name)
                )

    def _keep_used_slots(self, ranking: NodeProto, threshold: str, known: Collection[str]) -> None:
        """Truncates the ranking after the last slot used by any canvas, but keeps at least two.

        ONNX Runtime has another kernel for products with a single row, which sums in another
        order.
        """
        scores, index = ranking.output
        slots = self.graph.array(ranking.input[1])
        if slots is None:
            raise GraphError("the number of candidates is not a constant of the graph")
        (candidates,) = slots.tolist()
        all_scores, all_index = self.prefix + scores, self.prefix + index
        ranking.output[:] = [all_scores, all_index]
        # "Not below" instead of "above": NaN counts as used, so that the server can reject it.
        below = self.add("LessOrEqual", [all_scores, threshold], "below")
        used = self.add("Not", [below], "used")
        used = self.add("Cast", [used], "used_int", to=TensorProto.INT64)
        numbers = self.constant("numbers", range(1, candidates + 1))
        used = self.add("Mul", [used, numbers], "used_numbers")
        last = self.add("ReduceMax", [used], "last", keepdims=0)
        last = self.add("Max", [last, self.constant("least", min(2, candidates))], "at_least")
        self.count = self.add("Reshape", [last, self.constant("vector", [1])], "count")
        start, axis = self.constant("start", [0]), self.constant("axis", [1])
        for given, kept in ((all_scores, scores), (all_index, index)):
            self.nodes.append(
                helper.make_node("Slice", [given, start, self.count, axis], [kept], name=kept)
            )
        for node in self.graph.nodes:
            if node.output[0] not in {*known, all_scores}:
                node.input[:] = [
                    self.count if self._is_constant(n, candidates) else n for n in node.input
                ]

    def _is_constant(self, name: str, count: int) -> bool:
        """Whether a value is the constant [count]."""
        weight = self.graph.weights.get(name)
        if weight is None or weight.data_type != TensorProto.INT64 or list(weight.dims) != [1]:
            return False
        return bool(numpy_helper.to_array(weight)[0] == count)

    def _add_need(self, level_of: str, used: str, level: int) -> str:
        """Adds the value [B] bool: whether a canvas has a candidate at a level."""
        own = self.add("Equal", [level_of, self.constant(f"level{level}", level)], f"own{level}")
        own = self.add("And", [own, used], f"candidates{level}")
        own = self.add("Cast", [own], f"candidates{level}_int", to=TensorProto.INT32)
        axis = self.constant("axis", [1])
        own = self.add("ReduceMax", [own, axis], f"some{level}", keepdims=0)
        return self.add("Cast", [own], f"need{level}", to=TensorProto.BOOL)

    def _add_level(
        self, number: int, level: Level, region: list[NodeProto], need: str
    ) -> list[str]:
        """Adds a level's `If`; returns its outputs, whose former producers it replaces."""
        some = self.add("Cast", [need], f"need{number}_int", to=TensorProto.INT32)
        some = self.add("ReduceMax", [some], f"need{number}_any", keepdims=0)
        some = self.add("Cast", [some], f"enter{number}", to=TensorProto.BOOL)
        then_branch = _Branch(f"level{number}/")
        maps = self._copy(region, level.maps, need, then_branch)
        else_branch = _Branch(f"no_level{number}/")
        if level.merge is not None:
            here, _, before = level.merge.input
            maps = [then_branch.add("Where", [here, maps[0], before], "merged")]
            empty = [else_branch.add("Identity", [before], "before")]
            outputs = list(level.merge.output)
        else:
            outputs = level.maps
            decoupled = len(outputs) > 1
            empty = [self._zeros(name, else_branch, decoupled) for name in outputs]
        float_type = int(TensorProto.FLOAT)
        self.nodes.append(
            helper.make_node(
                "If",
                [some],
                outputs,
                name=f"{self.prefix}level{number}",
                then_branch=then_branch.close(maps, float_type),
                else_branch=else_branch.close(empty, float_type),
            )
        )
        return outputs

    def _zeros(self, name: str, branch: _Branch, decoupled: bool) -> str:
        """Zeros in place of a level's maps: [B, S, h, w] if decoupled, else [B, k, h, w]."""
        batch = branch.add("Shape", ["images"], f"{name}/batch", start=0, end=1)
        width = self.count
        if decoupled:
            width = branch.constant(f"{name}/channels", [self._count_channels(name)])
        canvas_hw = branch.add("Shape", ["images"], f"{name}/canvas_hw", start=1, end=3)
        stride = branch.constant(f"{name}/stride", [self.mask_stride])
        mask_hw = branch.add("Div", [canvas_hw, stride], f"{name}/mask_hw")
        shape = branch.add("Concat", [batch, width, mask_hw], f"{name}/shape", axis=0)
        return branch.add("ConstantOfShape", [shape], f"{name}/zeros")

    def _count_channels(self, name: str) -> int:
        """S of a decoupled head's map, from the convolution that produces it."""
        while self.graph.producers[name].op_type != "Conv":
            name = self.graph.producers[name].input[0]
        weight = self.graph.producers[name].input[1]
        while weight not in self.graph.weights:  # int8
            weight = self.graph.producer(weight, "DequantizeLinear").input[0]
        return int(self.graph.weights[weight].dims[0])

    def _copy(
        self, region: list[NodeProto], maps: list[str], need: str, branch: _Branch
    ) -> list[str]:
        """Copies a level's nodes into a branch, to run on b of the B canvases."""
        inside = {name for node in region for name in node.output}
        names = {name: branch.prefix + name for name in inside}
        outer = [(node, name) for node in region for name in node.input if name not in inside]
        for node, name in outer:
            if not name or name in names:
                continue
            if name in self.graph.weights:
                names[name] = branch.prefix + name
                copy = TensorProto()
                copy.CopyFrom(self.graph.weights[name])
                copy.name = names[name]
                branch.weights[copy.name] = copy
            elif node.op_type != "Shape" and len(self.dims.get(name, ())) > 1:
                names[name] = branch.add("Compress", [name, need], name, axis=0)
        some = next(node.output[0] for node in branch.nodes)
        for node in region:
            copied = NodeProto()
            copied.CopyFrom(node)
            copied.name = branch.prefix + node.name
            first = next((a.i for a in node.attribute if a.name == "start"), 0)
            if node.op_type == "Shape" and first == 0 and node.input[0] not in inside:
                copied.input[:] = [some]
            else:
                copied.input[:] = [names.get(name, name) for name in node.input]
            copied.output[:] = [names[name] for name in node.output]
            branch.nodes.append(copied)
        rows = branch.add("Cast", [need], "rows_int", to=TensorProto.INT64)
        rows = branch.add("CumSum", [rows, branch.constant("first_axis", 0)], "rows_counted")
        rows = branch.add("Sub", [rows, branch.constant("one", 1)], "rows_from_zero")
        rows = branch.add("Max", [rows, branch.constant("zero", 0)], "rows")
        return [branch.add("Gather", [names[m], rows], f"{m}/all", axis=0) for m in maps]


def _replace_nodes(
    graph: onnx.GraphProto, nodes: list[NodeProto], weights: dict[str, TensorProto]
) -> None:
    """Replaces a graph's nodes and weights, sorted topologically and without unused ones."""
    producers = {name: number for number, node in enumerate(nodes) for name in node.output}
    reads = [_find_reads(node) for node in nodes]
    needed: dict[int, set[int]] = {}
    pending = [producers[output.name] for output in graph.output]
    while pending:
        number = pending.pop()
        if number not in needed:
            needed[number] = {producers[name] for name in reads[number] if name in producers}
            pending += sorted(needed[number])
    order = TopologicalSorter({n: sorted(needed[n]) for n in sorted(needed)}).static_order()
    del graph.node[:]
    used: set[str] = set()
    for number in order:
        graph.node.append(nodes[number])
        used |= reads[number]
    kept = [w for w in (*graph.initializer, *weights.values()) if w.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _find_reads(node: NodeProto) -> set[str]:
    """Inputs of a node, including outer values read by its subgraphs."""
    found = set(node.input)
    for attribute in node.attribute:
        for inner in attribute.g.node:
            found |= _find_reads(inner)
    return found
