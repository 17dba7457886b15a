"""The weights of a published graph, by the names that the network has for them.

`solo-export` leaves convolutions as they are and calls their weights `network.<name>`. Batch norm
is folded into the convolution before it, and comes back as one that adds the bias and does
nothing else; group norm is an InstanceNormalization with its scale and shift behind it. Equal
tensors are stored once, so everything but a convolution's weight is found by following the graph.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from pathlib import Path

import onnx
import torch
from onnx import NodeProto, numpy_helper
from torch import Tensor, nn

from service.models.artefacts import ONNX_FILE, Artefacts
from service.models.repository import ModelRefused, read_config
from training.model.solo import Solo
from training.weights.formats import CheckpointError

PREFIX = "network."
CONVOLUTIONS = ("Conv", "DeformConv")
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
"""In the order of ONNX's inputs."""
GROUP_NORM = ("Reshape", "InstanceNormalization", "Reshape", "Mul", "Add")
_CONV_OF_NORM = (
    (r"\bbn(\d)$", r"conv\1"),
    (r"\bgn$", "conv"),
    (r"\bdownsample\.1$", "downsample.0"),
)


def read_published(folder: Path, model: Solo) -> dict[str, Tensor]:
    """The state dict of a model_repo folder's latest version.

    Args:
        folder: A model's folder; config.json and the graph's hash are checked as the server does.
        model: The network that the weights are for; its category output may have another shape.

    Raises:
        CheckpointError: The folder is refused, or the graph is not that of such a network; names
            the first weight that is not found or has no place.
    """
    if model.config.backbone.norm == "bn":
        raise CheckpointError(
            f"{folder} has its batch norm folded into the convolutions, so its statistics cannot "
            "train on; --set model.backbone.norm=frozen_bn"
        )
    try:
        config = read_config(folder)
        artefacts = Artefacts(folder / str(config.version), config.files)
        content = artefacts.read_graph(ONNX_FILE)
    except ModelRefused as error:
        raise CheckpointError(str(error)) from error
    proto = onnx.load_from_string(content) if isinstance(content, bytes) else onnx.load(content)
    graph = _Graph(proto.graph, artefacts.folder / ONNX_FILE)
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, nn.GroupNorm):
            tensors = _group_norm(graph, name, module)
        elif isinstance(module, nn.BatchNorm2d):
            tensors = _batch_norm(graph, name, module)
        elif isinstance(module, nn.Conv2d):
            tensors = _convolution(graph, name, module)
        else:
            continue
        state |= {f"{name}.{key}": value for key, value in tensors.items()}
    graph.check_all_used()
    return state


def _convolution(graph: _Graph, name: str, module: nn.Conv2d) -> dict[str, Tensor]:
    node = graph.convolution(name)
    tensors = {"weight": graph.tensor(node, 1, name)}
    if module.bias is not None:
        has_bias = len(node.input) > 2  # the exporter leaves out one of zeros
        tensors["bias"] = graph.tensor(node, 2, name) if has_bias else torch.zeros_like(module.bias)
    return tensors


def _batch_norm(graph: _Graph, name: str, module: nn.BatchNorm2d) -> dict[str, Tensor]:
    """Folded: the convolution's bias is what is left. Behind a deformable one it is not folded."""
    conv = _conv_of(name)
    if graph.is_followed_by(conv, "BatchNormalization"):
        (norm,) = graph.follow(conv, ("BatchNormalization",))
        return {key: graph.tensor(norm, i, name) for i, key in enumerate(BATCH_NORM, start=1)}
    bias = graph.tensor(graph.convolution(conv), 2, name)
    zeros, ones = torch.zeros_like(bias), torch.ones_like(bias)
    scale = ones * math.sqrt(1 + module.eps)
    return dict(zip(BATCH_NORM, (scale, bias, zeros, ones), strict=True))


def _group_norm(graph: _Graph, name: str, module: nn.GroupNorm) -> dict[str, Tensor]:
    _, normalise, _, scale, shift = graph.follow(_conv_of(name), GROUP_NORM)
    groups = len(graph.tensor(normalise, 1, name))
    if groups != module.num_groups:
        raise CheckpointError(
            f"{graph.path} has {groups} groups in {name}, expected {module.num_groups}"
        )
    tensors = {"weight": graph.tensor(scale, 1, name), "bias": graph.tensor(shift, 1, name)}
    return {key: value.flatten() for key, value in tensors.items()}


def _conv_of(norm: str) -> str:
    """The convolution before a norm."""
    for pattern, conv in _CONV_OF_NORM:
        name, matches = re.subn(pattern, conv, norm)
        if matches:
            return name
    raise AssertionError(f"{norm} follows no convolution")


class _Graph:
    """A published graph, seen from its convolutions.

    Args:
        graph: As `solo-export` writes it.
        path: Where it was read, for messages.
    """

    def __init__(self, graph: onnx.GraphProto, path: Path) -> None:
        self.path = path
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.convolutions: dict[str, NodeProto] = {}
        self.users: dict[str, list[NodeProto]] = defaultdict(list)
        self.unused: set[str] = set()
        for node in graph.node:
            for value in node.input:
                self.users[value].append(node)
            if node.op_type in CONVOLUTIONS:
                self.convolutions.setdefault(node.input[1], node)
        self.unused = set(self.convolutions)

    def convolution(self, name: str) -> NodeProto:
        """The first node that applies a convolution; a head's come once for every level."""
        weight = f"{PREFIX}{name}.weight"
        if weight not in self.convolutions:
            raise CheckpointError(
                f"{self.path} has no convolution with the weight {name}.weight: it is another "
                "network, or one that only its checkpoint can start (a vanilla head)"
            )
        self.unused.discard(weight)
        return self.convolutions[weight]

    def tensor(self, node: NodeProto, index: int, name: str) -> Tensor:
        """An input of a node that is stored in the graph."""
        value = node.input[index] if index < len(node.input) else ""
        if value not in self.initializers:
            raise CheckpointError(
                f"{self.path}: input {index} of {node.name} ({node.op_type}), which belongs to "
                f"{name}, is no stored tensor"
            )
        return torch.from_numpy(numpy_helper.to_array(self.initializers[value]).copy())

    def is_followed_by(self, conv: str, operator: str) -> bool:
        """Whether the output of a convolution goes to an operator."""
        return any(
            user.op_type == operator for user in self.users[self.convolution(conv).output[0]]
        )

    def follow(self, conv: str, operators: tuple[str, ...]) -> list[NodeProto]:
        """The nodes behind a convolution, each the only user of its kind of the one before."""
        nodes = [self.convolution(conv)]
        for operator in operators:
            users = [u for u in self.users[nodes[-1].output[0]] if u.op_type == operator]
            if len(users) != 1:
                raise CheckpointError(
                    f"{self.path} has {len(users)} {operator} nodes behind {nodes[-1].name}, "
                    f"expected {' > '.join(operators)} behind the convolution {conv}"
                )
            nodes += users
        return nodes[1:]

    def check_all_used(self) -> None:
        """Refuses a graph with convolutions that the network does not have."""
        if self.unused:
            names = sorted(weight.removeprefix(PREFIX) for weight in self.unused)
            raise CheckpointError(
                f"{self.path} has weights that this network has no place for: "
                f"{', '.join(names[:5])}"
            )
