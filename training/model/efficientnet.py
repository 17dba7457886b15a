"""EfficientNet-Lite0 with the names of its published PyTorch weights (without its classifier).

"EfficientNet: Rethinking Model Scaling", arXiv 1905.11946; the lite variant has ReLU6 and no
squeeze-and-excitation. Its weights were trained in TensorFlow: they need its padding ("SAME"),
its epsilon of batch norm, and pixels scaled to about -1..1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.configs.schema import BackboneConfig
from training.model.norm import NormLayer, build_norm

PUBLISHED_WIDTH = 32
"""Channels of the stem for which there are weights."""
STAGES = (
    ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2)),
    ((6, 5, 2, 40, 2),),
    ((6, 3, 2, 80, 3), (6, 5, 1, 112, 3)),
    ((6, 5, 2, 192, 4), (6, 3, 1, 320, 1)),
)
"""Groups of blocks by the level that they end in, C2..C5: expansion, kernel, stride, channels and
number of blocks."""
BATCH_NORM_EPS = 1e-3
_DIVISOR = 8


def scale_channels(channels: int, base_width: int) -> int:
    """Channels of a network of another width, a multiple of 8 and at least 0.9 of the exact."""
    exact = channels * base_width / PUBLISHED_WIDTH
    rounded = max(_DIVISOR, int(exact + _DIVISOR / 2) // _DIVISOR * _DIVISOR)
    return rounded + _DIVISOR if rounded < 0.9 * exact else rounded


def pad_same(x: Tensor, kernel: int) -> Tensor:
    """Zero padding of a convolution of stride 2 as in TensorFlow, for even sides."""
    before = (kernel - 2) // 2
    after = kernel - 2 - before
    return F.pad(x, (before, after, before, after))


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution (with the stride), linear 1x1 projection.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; the input is added if it has the same shape.
        expansion: Factor of the channels between; 1: there is no expansion.
        kernel: Side of the depthwise convolution.
        stride: 1 or 2, of the depthwise convolution.
        norm: Builds a normalisation layer.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expansion: int,
        kernel: int,
        stride: int,
        norm: NormLayer,
    ) -> None:
        super().__init__()
        width = in_channels * expansion
        self.expands, self.halves = expansion != 1, stride == 2
        self.adds = stride == 1 and in_channels == out_channels
        if self.expands:
            self.expand_conv = nn.Conv2d(in_channels, width, 1, bias=False)
            self.bn0 = norm(width)
        padding = 0 if self.halves else kernel // 2
        self.depthwise_conv = nn.Conv2d(
            width, width, kernel, stride, padding, groups=width, bias=False
        )
        self.bn1 = norm(width)
        self.project_conv = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn2 = norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H / stride, W / stride]."""
        out = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        if self.halves:
            out = pad_same(out, self.depthwise_conv.kernel_size[0])
        out = F.relu6(self.bn1(self._filter(out)))
        projected: Tensor = self.bn2(self.project_conv(out))
        return projected + x if self.adds else projected

    def _filter(self, x: Tensor) -> Tensor:
        """The depthwise convolution; on a CPU in fp32, as its gradient in bf16 takes longer."""
        if x.is_cpu and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                out: Tensor = self.depthwise_conv(x.float())
                return out.to(x.dtype)
        return self.depthwise_conv(x)  # type: ignore[no-any-return]


class EfficientNetLite0(nn.Module):
    """Backbone that returns C2..C5 (strides 4, 8, 16, 32).

    Attributes:
        out_channels: Channels of C2..C5.
    """

    pixel_mean = (127.0, 127.0, 127.0)
    pixel_std = (128.0, 128.0, 128.0)

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        norm = build_norm(config.norm, BATCH_NORM_EPS)
        channels = config.base_width
        self.conv_stem = nn.Conv2d(3, channels, 3, 2, 0, bias=False)
        self.bn0 = norm(channels)
        blocks: list[nn.Module] = []
        ends, outs = [], []
        for groups in STAGES:
            for expansion, kernel, first_stride, published, count in groups:
                out_channels = scale_channels(published, config.base_width)
                for index in range(count):
                    block = InvertedResidual(
                        channels,
                        out_channels,
                        expansion=expansion,
                        kernel=kernel,
                        stride=first_stride if index == 0 else 1,
                        norm=norm,
                    )
                    blocks.append(block)
                    channels = out_channels
            ends.append(len(blocks))
            outs.append(channels)
        self.blocks = nn.ModuleList(blocks)
        self.ends, self.out_channels = tuple(ends), tuple(outs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self._freeze(config.frozen_stages)

    def _freeze(self, stages: int) -> None:
        if stages > 0:
            last = self.ends[stages - 1]
            for module in (self.conv_stem, self.bn0, *self.blocks[:last]):
                module.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images [B, 3, H, W] -> C2..C5, each [B, c, H / stride, W / stride]."""
        x = F.relu6(self.bn0(self.conv_stem(pad_same(x, 3))))
        features = []
        for number, block in enumerate(self.blocks, 1):
            x = block(x)
            if number in self.ends:
                features.append(x)
        c2, c3, c4, c5 = features
        return c2, c3, c4, c5
