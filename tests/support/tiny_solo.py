"""Tiny random SOLO networks that find something: for tests of what comes after training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipeline.model_config import ClassSpec, InputSpec, TileResize
from training.configs import get_config
from training.configs.schema import BackboneConfig, Config, HeadConfig, HeadKind, NetworkConfig
from training.model.deform import DeformConv2d
from training.model.solo import Solo
from training.weights.formats import save_checkpoint

CLASSES = (ClassSpec(category_id=3, name="disc"), ClassSpec(category_id=7, name="ring"))


def tiny_config(
    kind: HeadKind = "decoupled_light",
    recipe: Literal["paper", "published"] = "published",
    name: str = "tiny",
) -> Config:
    """A ResNet-18 of an eighth of the width, two levels, two classes, tiles of 64x64 px at 2x."""
    head = HeadConfig(
        kind=kind,
        channels=16,
        num_convs=1,
        num_grids=(8, 5),
        level_strides=(8, 16),
        mask_strides=(4, 8),
        scale_ranges=((1, 48), (32, 2048)),
        coord_octaves=1 if kind == "decoupled_light" else 0,
        norm_groups=4,
    )
    backbone = BackboneConfig(depth=18, base_width=8, norm="bn", frozen_stages=0)
    model = NetworkConfig(
        backbone=backbone, neck_channels=16, head=head, recipe=recipe, candidates=60
    )
    resize = TileResize(scale=2.0, tile_hw=(64, 64), overlap_px=16)
    return replace(
        get_config("nuclei"),
        name=name,
        description="for tests",
        model=model,
        input=InputSpec(resize=resize),
        num_classes=len(CLASSES),
        classes=CLASSES,
    )


def tiny_network(config: Config, seed: int = 0) -> Solo:
    """Random weights, large enough in the output layers that scores and masks vary."""
    generator = torch.Generator().manual_seed(seed)
    network = Solo(config.model, config.num_classes).eval()
    for name, parameter in network.named_parameters():
        if parameter.ndim == 4:
            fan_in = parameter[0].numel()
            scale = 4.0 if "_out" in name else 1.5
            with torch.no_grad():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * scale / fan_in**0.5)
    for module in network.head.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # so that folding it away has something to do
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.7, 1.3, generator=generator)
    _scale_offsets(network)
    return network


def _scale_offsets(network: Solo) -> None:
    """Lets deformable convolutions look about 1.5 px away; random weights would look far outside.

    Each is scaled when data first passes through it, so that the next one sees the result.
    """
    handles: dict[nn.Module, RemovableHandle] = {}

    def scale(conv: nn.Module, _: tuple[Tensor, ...], offsets: Tensor) -> Tensor:
        factor = 1.5 / offsets.std()
        assert isinstance(conv.weight, Tensor)
        conv.weight.mul_(factor)
        handles.pop(conv).remove()
        return offsets * factor

    for module in network.modules():
        if isinstance(module, DeformConv2d):
            nn.init.zeros_(module.conv_offset.bias)  # type: ignore[arg-type]
            handles[module.conv_offset] = module.conv_offset.register_forward_hook(scale)
    if handles:
        with torch.no_grad():
            noise = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
            network(noise)


def save_tiny_checkpoint(path: Path, config: Config, seed: int = 0) -> Solo:
    """Writes a checkpoint of `tiny_network` and returns the network."""
    network = tiny_network(config, seed)
    save_checkpoint(path, config, {"model": network.state_dict(), "ema": None})
    return network
