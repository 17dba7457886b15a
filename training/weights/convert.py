"""Published SOLO models under our names, and the configuration that their shapes imply.

The authors' code and mmdetection 3 store the same tensors under different names of the head.
Shapes and values need no change; the backbone has torchvision's names everywhere.

    authors                     mmdetection                    here
    bbox_head.cate_convs.i      mask_head.cls_convs.i          head.category_convs.i
    bbox_head.ins_convs[_x].i   mask_head.mask_convs[_x].i     head.mask_convs[_x].i
    bbox_head.[d]solo_cate      mask_head.conv_cls             head.category_out
    bbox_head.[d]solo_ins_list  mask_head.conv_mask_list       head.mask_out
    neck.fpn_convs.i.conv       neck.fpn_convs.i.conv          neck.output_convs.i
    neck.lateral_convs.i.conv   neck.lateral_convs.i.conv      neck.lateral_convs.i

What shapes do not determine (strides, scale ranges, groups of GroupNorm, input size, thresholds)
comes from the most similar configuration of the zoo.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from training.configs.coco import COCO_CONFIGS
from training.configs.schema import BackboneConfig, Config, HeadConfig, HeadKind, NetworkConfig
from training.model.resnet import BLOCKS_PER_STAGE
from training.weights.formats import CheckpointError, check_fit, refuse_keys

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each weight by our names."""

_RULES = tuple(
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"backbone\.", "backbone."),
        (r"neck\.lateral_convs\.(\d+)\.conv\.", r"neck.lateral_convs.\1."),
        (r"neck\.fpn_convs\.(\d+)\.conv\.", r"neck.output_convs.\1."),
        (r"(?:mask_head\.cls_convs|bbox_head\.cate_convs)\.", "head.category_convs."),
        (r"(?:mask_head\.mask_convs|bbox_head\.ins_convs)(_[xy])?\.", r"head.mask_convs\1."),
        (r"(?:mask_head\.conv_cls|bbox_head\.d?solo_cate)\.", "head.category_out."),
        (
            r"(?:mask_head\.conv_mask_list|bbox_head\.d?solo_ins_list)(_[xy])?\.",
            r"head.mask_out\1.",
        ),
    )
)


_SOLO_V2 = re.compile(
    r"mask_feat_head\.|mask_head\.mask_feature_head\."
    r"|(?:mask|bbox)_head\.(?:kernel_convs|conv_kernel|solo_kernel)\."
)


def convert_key(key: str) -> str:
    """Our name of a published key.

    Raises:
        CheckpointError: Neither publisher has a key of this name.
    """
    for pattern, ours in _RULES:
        match = pattern.match(key)
        if match:
            return match.expand(ours) + key[match.end() :]
    raise CheckpointError(f"{key!r} is not a key of a published SOLO model")


def convert_names(published: Iterable[str], source: str) -> dict[str, str]:
    """The published key of each of our names.

    Raises:
        CheckpointError: It is a SOLOv2 model; or names the first keys that are unknown, or that
            give the same name.
    """
    published = list(published)
    dynamic = next((key for key in published if _SOLO_V2.match(key)), None)
    if dynamic is not None:
        raise CheckpointError(
            f"weights of {source} are SOLOv2's, which predicts its mask kernels ({dynamic}); "
            "only SOLO and Decoupled SOLO can be imported"
        )
    theirs: dict[str, str] = {}
    unknown, duplicate = [], []
    for key in published:
        try:
            ours = convert_key(key)
        except CheckpointError:
            unknown.append(key)
            continue
        if ours in theirs:
            duplicate.append(f"{key} and {theirs[ours]} (both {ours})")
        theirs[ours] = key
    refuse_keys("keys that no published SOLO model has", unknown, source)
    refuse_keys("two keys for one weight", duplicate, source)
    return theirs


def convert_state_dict(
    published: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Renames a published state dict and checks that it fits a model.

    Args:
        published: Under the authors' or mmdetection's names.
        expected: State dict of the model to fill; only names and shapes are read, so it may
            be on the meta device.
        source: What a message calls `published`.

    Returns:
        The same tensors under our names.

    Raises:
        CheckpointError: Names the first keys that are unknown, duplicate, unexpected, missing or
            of another shape, by the names of the file where it has them.
    """
    theirs = convert_names(published, source)
    state = {ours: published[key] for ours, key in theirs.items()}
    check_fit(state, expected, source, theirs)
    return state


def count_classes(shapes: Shapes) -> int:
    """C, the outputs of the category branch.

    Raises:
        CheckpointError: There is no category branch.
    """
    return _shape(shapes, "head.category_out.weight")[0]


def infer_config(shapes: Shapes) -> tuple[Config, list[str]]:
    """The configuration of a network with these weights.

    Args:
        shapes: By our names.

    Returns:
        The configuration of the zoo that has exactly this network, or else the most similar one
        with its network changed and `_custom` appended to its name; and the changes, one line
        each.

    Raises:
        CheckpointError: It is not a SOLO network, or its shapes do not determine it.
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


def _fit(model: NetworkConfig, shapes: Shapes) -> NetworkConfig:
    """`model` with every field replaced that the shapes determine."""
    try:
        backbone = _backbone(model.backbone, shapes)
        neck_channels = _shape(shapes, "neck.output_convs.0.weight")[0]
        head = _head(model.head, neck_channels, shapes)
        return replace(model, backbone=backbone, neck_channels=neck_channels, head=head)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(
            f"the network cannot be inferred from its weights: {error}; name it with --config"
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
        f"the backbone has {blocks} {'bottleneck' if bottleneck else 'basic'} blocks per stage, "
        f"which is not one of ResNet-{', '.join(map(str, BLOCKS_PER_STAGE))}"
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
    changes: dict[str, Any] = {"category_kernel": _shape(shapes, "head.category_out.weight")[-1]}
    if kind != "vanilla":
        changes["mask_kernel"] = kernel
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
    """Number of different values of the first group of a pattern in the names that match it."""
    matches = (re.match(pattern, name) for name in shapes)
    return len({match[1] for match in matches if match})


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise CheckpointError(f"it has no {name}, which every SOLO network has")
    return shapes[name]


def _differences(zoo: Mapping[str, Any], found: Mapping[str, Any], path: str = "") -> list[str]:
    """Fields of `found` that differ from `zoo`, one line each."""
    lines = []
    for name, value in found.items():
        if isinstance(value, Mapping):
            lines += _differences(zoo[name], value, f"{path}{name}.")
        elif value != zoo[name]:
            lines.append(f"{path}{name} is {value}, not {zoo[name]}")
    return lines
