"""Checkpoints as the authors' code and mmdetection write them, with random weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tests.support.tiny_solo import tiny_network
from training.configs.schema import BackboneConfig, Config, HeadConfig, HeadKind, NetworkConfig
from training.model.solo import Solo

Publisher = Literal["authors", "mmdetection"]
_NECK = (
    (r"neck\.lateral_convs\.(\d)\.", r"neck.lateral_convs.\1.conv."),
    (r"neck\.output_convs\.(\d)\.", r"neck.fpn_convs.\1.conv."),
)
_HEADS: dict[Publisher, tuple[tuple[str, str], ...]] = {
    "mmdetection": (
        (r"head\.category_convs\.", "mask_head.cls_convs."),
        (r"head\.mask_convs", "mask_head.mask_convs"),
        (r"head\.category_out\.", "mask_head.conv_cls."),
        (r"head\.mask_out", "mask_head.conv_mask_list"),
    ),
    "authors": (
        (r"head\.category_convs\.", "bbox_head.cate_convs."),
        (r"head\.mask_convs", "bbox_head.ins_convs"),
        (r"head\.category_out\.", "bbox_head.{d}solo_cate."),
        (r"head\.mask_out", "bbox_head.{d}solo_ins_list"),
    ),
}


def published_name(ours: str, publisher: Publisher, kind: HeadKind) -> str:
    """A publisher's name of one of our weights."""
    for pattern, theirs in (*_NECK, *_HEADS[publisher]):
        name, found = re.subn("^" + pattern, theirs, ours)
        if found:
            return name.replace("{d}", "" if kind == "vanilla" else "d")
    return ours


def publish(network: Solo, publisher: Publisher) -> dict[str, Tensor]:
    """A network's state dict under a publisher's names."""
    kind = network.config.head.kind
    state = network.state_dict()
    return {published_name(key, publisher, kind): value for key, value in state.items()}


def small_config(kind: HeadKind = "decoupled", num_classes: int = 80) -> Config:
    """Five levels as published, but a narrow ResNet-18 and coarse grids."""
    num_grids = (6, 5, 4, 3, 2)
    head = HeadConfig(kind=kind, channels=32, num_convs=2, num_grids=num_grids)
    backbone = BackboneConfig(depth=18, base_width=8)
    model = NetworkConfig(backbone=backbone, neck_channels=16, head=head)
    return Config(name="small", model=model, num_classes=num_classes)


def write_published(
    path: Path,
    config: Config,
    publisher: Publisher = "mmdetection",
    *,
    meta: dict[str, Any] | None = None,
    legacy: bool = False,
    seed: int = 0,
) -> Solo:
    """Writes a checkpoint of random weights and returns the network.

    Args:
        path: File to write.
        config: Of the network.
        publisher: Whose names.
        meta: Entry of that name; None writes an empty one.
        legacy: In the format before PyTorch 1.6, as the published files are.
        seed: Of the weights.
    """
    network = tiny_network(config, seed)
    content = {"meta": meta or {}, "state_dict": publish(network, publisher)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return network
