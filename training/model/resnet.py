"""ResNet-18/34/50/101 with torchvision's state-dict names (without its classifier).

"Deep Residual Learning for Image Recognition", arXiv 1512.03385; the stride of a bottleneck is
in its 3x3 convolution, as in torchvision and in the published SOLO models.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.configs.schema import BackboneConfig
from training.model.deform import DeformConv2d, reset_offsets
from training.model.norm import NormLayer, build_norm

BLOCKS_PER_STAGE = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, norm: NormLayer) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = norm(width)
        self.downsample = _shortcut(in_channels, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, width, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 convolutions and a shortcut.

    Args:
        in_channels: Channels of the input.
        width: Channels between the 1x1 convolutions.
        stride: Stride of the 3x3 convolution.
        norm: Builds a normalisation layer.
        deformable: Whether the 3x3 convolution is deformable.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        norm: NormLayer,
        deformable: bool = False,
    ) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = norm(width)
        conv = DeformConv2d if deformable else nn.Conv2d
        self.conv2 = conv(width, width, 3, stride, 1, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, 4 * width, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        return torch.relu(self.bn3(self.conv3(out)) + shortcut)


def _shortcut(
    in_channels: int, out_channels: int, stride: int, norm: NormLayer
) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(conv, norm(out_channels))


class ResNet(nn.Module):
    """Backbone that returns C2..C5 (strides 4, 8, 16, 32).

    Attributes:
        out_channels: Channels of C2..C5.
    """

    pixel_mean = (123.675, 116.28, 103.53)
    pixel_std = (58.395, 57.12, 57.375)

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        if config.depth not in BLOCKS_PER_STAGE:
            raise ValueError(
                f"backbone depth is {config.depth}, expected one of {sorted(BLOCKS_PER_STAGE)}"
            )
        norm = build_norm(config.norm)
        width = config.base_width
        self.frozen_stages = config.frozen_stages
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = norm(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels, outs = width, []
        for stage, blocks in enumerate(BLOCKS_PER_STAGE[config.depth]):
            layers: list[nn.Module] = []
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                shape = (channels, width * 2**stage, stride, norm)
                if config.depth < 50:
                    block: BasicBlock | Bottleneck = BasicBlock(*shape)
                else:
                    block = Bottleneck(*shape, stage + 1 in config.deformable_stages)
                layers.append(block)
                channels = width * 2**stage * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
            outs.append(channels)
        self.out_channels = tuple(outs)
        self._init_weights()
        self._freeze()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        reset_offsets(self)

    def _freeze(self) -> None:
        frozen: list[nn.Module] = []
        if self.frozen_stages > 0:
            frozen = [self.conv1, self.bn1]
            frozen += [self.get_submodule(f"layer{i}") for i in range(1, self.frozen_stages + 1)]
        for module in frozen:
            module.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images [B, 3, H, W] -> C2..C5, each [B, c, H / stride, W / stride]."""
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        c2 = self.get_submodule("layer1")(x)
        c3 = self.get_submodule("layer2")(c2)
        c4 = self.get_submodule("layer3")(c3)
        return c2, c3, c4, self.get_submodule("layer4")(c4)
