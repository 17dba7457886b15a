"""Which network a state dict belongs to, from the names and shapes of its weights.

What no shape tells (strides, scale ranges, groups of GroupNorm, input size, thresholds) comes from
the nearest configuration of the zoo.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from training.checkpoint import CheckpointError
from training.configs.coco import COCO_CONFIGS
from training.configs.schema import BackboneConfig, Config, HeadConfig, HeadKind, ModelConfig
from training.model.resnet import BLOCKS_PER_STAGE

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each weight by our names (`training.convert`)."""


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def count_classes(shapes: Shapes) -> int:
    """C, the outputs of the category branch.

    Raises:
        CheckpointError: There is no category branch.
    """
    return _shape(shapes, "head.category_out.weight")[0]


def infer_config(shapes: Shapes) -> tuple[Config, list[str]]:
    """The configuration that weights belong to.

    Args:
        shapes: By our names.

    Returns:
        A configuration of the zoo if one has exactly this network, else the nearest one with
        the network changed and `_custom` behind its name; and those changes, one line each.

    Raises:
        CheckpointError: It is no SOLO network, or one that cannot be told from its shapes.
    """
    found = []
    for config in COCO_CONFIGS:
        model = _fit(config.model, shapes)
        changes = _differences(asdict(config.model), asdict(model))
        if not changes:
            return config, []
        found.append((len(changes), config, model, changes))
    _, nearest, model, changes = min(found, key=lambda candidate: candidate[0])
    name = f"{nearest.name}_custom"
    description = f"{nearest.description.rpartition(',')[0]}, network inferred from its weights"
    return replace(nearest, name=name, description=description, model=model), changes


def _fit(model: ModelConfig, shapes: Shapes) -> ModelConfig:
    """`model` with everything replaced that shapes tell."""
    try:
        backbone = _backbone(model.backbone, shapes)
        neck_channels = _shape(shapes, "neck.output_convs.0.weight")[0]
        head = _head(model.head, neck_channels, shapes)
        return replace(model, backbone=backbone, neck_channels=neck_channels, head=head)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(
            f"the network cannot be told from its weights: {error}; name it with --config"
        ) from error


def _backbone(backbone: BackboneConfig, shapes: Shapes) -> BackboneConfig:
    blocks = tuple(_count(shapes, rf"backbone\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    bottleneck = "backbone.layer1.0.conv3.weight" in shapes
    deformable = {name.split(".")[1] for name in shapes if _is_offset(name, "backbone.layer")}
    changes: dict[str, Any] = {
        "base_width": _shape(shapes, "backbone.conv1.weight")[0],
        "deformable_stages": tuple(sorted(int(layer[-1]) for layer in deformable)),
    }
    for depth, known in BLOCKS_PER_STAGE.items():
        if known == blocks and bottleneck == (depth >= 50):
            return replace(backbone, **changes, depth=depth)  # type: ignore[arg-type]
    raise CheckpointError(
        f"the backbone has {blocks} {'bottleneck' if bottleneck else 'basic'} blocks in its "
        f"stages, which is none of ResNet-{', '.join(map(str, BLOCKS_PER_STAGE))}"
    )


def _head(head: HeadConfig, neck_channels: int, shapes: Shapes) -> HeadConfig:
    kind = _kind(shapes)
    tower = "head.mask_convs_x" if kind == "decoupled" else "head.mask_convs"
    outputs = "head.mask_out" if kind == "vanilla" else "head.mask_out_x"
    num_convs = _count(shapes, rf"{re.escape(tower)}\.(\d+)\.")
    channels = _shape(shapes, f"{tower}.0.conv.weight")[0]
    coordinates = 1 if kind == "decoupled" else 2
    seen = [
        _shape(shapes, f"{tower}.{i}.conv.weight")[1] - (channels if i else neck_channels)
        for i in range(num_convs)
    ]
    out = [
        _shape(shapes, f"{outputs}.{level}.weight")
        for level in range(_count(shapes, rf"{re.escape(outputs)}\.(\d+)\."))
    ]
    grids = tuple(round(shape[0] ** 0.5) if kind == "vanilla" else shape[0] for shape in out)
    kernel = _shape(shapes, f"{outputs}.0.weight")[-1]
    changes: dict[str, Any] = {} if kind == "vanilla" else {"mask_kernel": kernel}
    return replace(
        head,
        kind=kind,
        channels=channels,
        num_convs=num_convs,
        num_grids=grids,
        num_coord_convs=sum(extra == coordinates for extra in seen),
        deformable=any(_is_offset(name, "head.") for name in shapes),
        **changes,
    )


def _kind(shapes: Shapes) -> HeadKind:
    if "head.mask_convs_x.0.conv.weight" in shapes:
        return "decoupled"
    return "decoupled_light" if "head.mask_out_x.0.weight" in shapes else "vanilla"


def _is_offset(name: str, start: str) -> bool:
    return name.startswith(start) and ".conv_offset." in name


def _count(shapes: Shapes, pattern: str) -> int:
    """How many different numbers the names that match have."""
    matches = (re.match(pattern, name) for name in shapes)
    return len({match[1] for match in matches if match})


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise CheckpointError(f"there is no {name} in it, which every SOLO network has")
    return shapes[name]


def _differences(zoo: Mapping[str, Any], found: Mapping[str, Any], path: str = "") -> list[str]:
    lines = []
    for name, value in found.items():
        if isinstance(value, Mapping):
            lines += _differences(zoo[name], value, f"{path}{name}.")
        elif value != zoo[name]:
            lines.append(f"{path}{name} is {value}, not {zoo[name]}")
    return lines
