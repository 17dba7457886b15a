"""Exports the network as one ONNX graph from uint8 canvases to ranked candidates.

Symbols: B batch, K candidates, H W canvas (multiples of 32), h w mask at the finest stride.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import onnx
import torch
from onnxscript import opset18 as op
from onnxscript import opset19
from torch import Tensor, nn

from export.errors import GraphError
from training.model.deform import DeformConv2d
from training.model.solo import Solo

OPSETS = (18, 19, 20)
"""From opset 21, GroupNorm is exported as one operator, whose CPU kernel in ONNX Runtime is about
three times slower than that of InstanceNormalization, to which lower opsets decompose it."""
DEFAULT_OPSET = 18
DEFORM_OPSET = 19
"""First opset with DeformConv."""
EXAMPLE_HW = (128, 192)
"""Height and width differ, so that the exporter cannot unify their symbolic sizes."""

INPUT_DIMS: dict[str, tuple[str | int, ...]] = {
    "images": ("batch", "height", "width", 3),
    "valid_hw": ("batch", 2),
}
OUTPUT_DIMS: dict[str, tuple[str | int, ...]] = {
    "scores": ("batch", "K"),
    "labels": ("batch", "K"),
    "mask_probs": ("batch", "K", "mask_height", "mask_width"),
}


class CandidateGraph(nn.Module):
    """Wraps a network so that `forward` is the exported function, `Solo.candidates`."""

    def __init__(self, network: Solo) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, valid_hw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H, W, 3] uint8 and [B, 2] int64 -> scores, labels and mask probabilities."""
        return self.network.candidates(images, valid_hw)


def num_candidates(network: Solo) -> int:
    """K: the configured number, at most one per grid cell and class."""
    cells = sum(s * s for s in network.config.head.num_grids)
    return min(network.config.candidates, cells * network.num_classes)


def choose_opset(network: Solo, opset: int | None = None) -> int:
    """The opset for a network's graph.

    Args:
        network: May have deformable convolutions.
        opset: Requested opset; None for the lowest that has all operators.

    Raises:
        GraphError: The opset is not supported, or lacks an operator of the network.
    """
    deformable = any(isinstance(module, DeformConv2d) for module in network.modules())
    lowest = DEFORM_OPSET if deformable else DEFAULT_OPSET
    if opset is None:
        return lowest
    if opset not in OPSETS:
        raise GraphError(f"opset is {opset}, expected one of {', '.join(map(str, OPSETS))}")
    if opset < lowest:
        raise GraphError(
            f"opset is {opset}, but the network has deformable convolutions and DeformConv "
            f"requires opset {lowest}"
        )
    return opset


def build_onnx(network: Solo, *, opset: int | None = None) -> bytes:
    """Exports a network; deterministic, so the same weights give the same bytes.

    Args:
        network: In evaluation mode, on the CPU.
        opset: 18 to 20; None for the lowest possible.

    Returns:
        The serialised graph with its weights.

    Raises:
        GraphError: The opset is not supported, or the graph violates its contract.
    """
    opset = choose_opset(network, opset)
    if network.training:
        raise GraphError("the network is in training mode; call eval() before the export")
    model = _export(network, opset)
    _strip(model)
    _name_dims(model, num_candidates(network))
    check_graph(model, opset)
    return bytes(model.SerializeToString(deterministic=True))


def _stable_sort(
    x: Any,
    stable: bool = True,
    dim: int = -1,
    descending: bool = False,
) -> Any:
    """A stable sort by TopK of all entries, which orders equal values by index."""
    axis: Any = op.Constant(value_ints=[dim])
    count = op.Gather(op.Shape(x), axis)
    return op.TopK(x, count, axis=dim, largest=int(descending), sorted=1)


def _deform_conv(x: Any, offset: Any, weight: Any, stride: int, padding: int, dilation: int) -> Any:
    """Translates `solo::deform_conv2d`; ONNX has the same order of offsets."""
    strides, pads, dilations = [stride] * 2, [padding] * 4, [dilation] * 2
    return opset19.DeformConv(x, weight, offset, strides=strides, pads=pads, dilations=dilations)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.sort.stable: _stable_sort,
    torch.ops.solo.deform_conv2d.default: _deform_conv,
}


def _export(network: Solo, opset: int) -> onnx.ModelProto:
    images = torch.zeros(2, *EXAMPLE_HW, 3, dtype=torch.uint8)
    valid_hw = torch.tensor([EXAMPLE_HW, (EXAMPLE_HW[0] - 9, EXAMPLE_HW[1] - 7)])
    batch = torch.export.Dim("batch", min=1)
    height = 32 * torch.export.Dim("height32", min=1)
    width = 32 * torch.export.Dim("width32", min=1)
    # It warns on every run about missing operators of libraries that are not used here.
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                CandidateGraph(network).eval(),
                (images, valid_hw),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=list(INPUT_DIMS),
                output_names=list(OUTPUT_DIMS),
                dynamic_shapes={
                    "images": {0: batch, 1: height, 2: width},
                    "valid_hw": {0: batch},
                },
                custom_translation_table=TRANSLATIONS,
            )
    finally:
        registration.setLevel(level)
    assert program is not None
    return program.model_proto


def _strip(model: onnx.ModelProto) -> None:
    """Removes metadata: stack traces, file paths, scopes, inferred shapes."""
    model.producer_name = "solo-serve"
    model.ClearField("producer_version")
    graph = model.graph
    graph.name = "solo"
    graph.ClearField("value_info")
    values = (*graph.input, *graph.output, *graph.initializer)
    for part in (model, graph, *graph.node, *values):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")


def _dims(value: onnx.ValueInfoProto) -> list[onnx.TensorShapeProto.Dimension]:
    return list(value.type.tensor_type.shape.dim)


def _name_dims(model: onnx.ModelProto, candidates: int) -> None:
    """Names the symbolic dimensions as in the contract.

    Raises:
        GraphError: An input or output is missing, or a dimension is fixed instead of symbolic or
            vice versa.
    """
    graph = model.graph
    for values, contract in ((graph.input, INPUT_DIMS), (graph.output, OUTPUT_DIMS)):
        if [v.name for v in values] != list(contract):
            raise GraphError(f"the graph has {[v.name for v in values]}, expected {list(contract)}")
        for value in values:
            wanted = [candidates if d == "K" else d for d in contract[value.name]]
            dims = _dims(value)
            found: list[str | int] = [d.dim_param or d.dim_value for d in dims]
            fits = len(found) == len(wanted) and all(
                isinstance(f, str) if isinstance(w, str) else f == w
                for f, w in zip(found, wanted, strict=True)
            )
            if not fits:
                raise GraphError(f"{value.name} has the shape {found}, expected {wanted}")
            for dim, name in zip(dims, wanted, strict=True):
                if isinstance(name, str):
                    dim.dim_param = name


def check_graph(model: onnx.ModelProto, opset: int) -> None:
    """Checks that a graph is valid ONNX of one opset, without functions or external data.

    Raises:
        GraphError: Names the violation.
    """
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GraphError(f"the exported graph is not valid ONNX: {error}") from error
    opsets = {o.domain: o.version for o in model.opset_import}
    if opsets.get("") != opset:
        raise GraphError(f"the exported graph has opset {opsets}, expected {opset}")
    foreign = sorted({n.domain for n in model.graph.node if n.domain})
    if foreign or model.functions:
        raise GraphError(f"the exported graph uses operators of other domains: {foreign}")
    outside = [t.name for t in model.graph.initializer if t.external_data]
    if outside:
        raise GraphError(f"the graph has external weights: {', '.join(outside[:5])}")
