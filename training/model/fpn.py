"""Necks: the feature pyramid ("Feature Pyramid Networks", arXiv 1612.03144) and a single level."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class FPN(nn.Module):
    """Lateral 1x1, nearest top-down sum, 3x3 output; P6 is P5 subsampled by 2.

    Args:
        in_channels: Channels of C2..C5.
        channels: Channels of every pyramid level.
        num_levels: 1..5, counted from the finest, P2.
    """

    first_stride = 4

    def __init__(self, in_channels: Sequence[int], channels: int, num_levels: int = 5) -> None:
        super().__init__()
        if not 1 <= num_levels <= 5:
            raise ValueError(f"num_levels is {num_levels}, expected 1 to 5 (P2..P6)")
        self.num_levels = num_levels
        self.lateral_convs = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output_convs = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in range(min(num_levels, 4))
        )
        _init_convs(self)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """C2..C5 [B, c, H / s, W / s] -> P2.. [B, channels, H / s, W / s], s = 4, 8, ... ."""
        merged = [conv(x) for conv, x in zip(self.lateral_convs, features, strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            size = merged[i - 1].shape[-2:]
            merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], size=size, mode="nearest")
        outs = [conv(x) for conv, x in zip(self.output_convs, merged, strict=False)]
        if self.num_levels == 5:
            outs.append(F.max_pool2d(outs[-1], kernel_size=1, stride=2))
        return outs


class SingleLevel(nn.Module):
    """Merges C3..C5 at stride 8: lateral 1x1, bilinear to C3's size, sum, 3x3 output.

    The paper's ablation only says that these three are merged at stride 8; the rest is our choice.

    Args:
        in_channels: Channels of C2..C5.
        channels: Channels of the output.
    """

    first_stride = 8

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels[1:])
        self.output_conv = nn.Conv2d(channels, channels, 3, padding=1)
        _init_convs(self)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """C2..C5 [B, c, H / s, W / s] -> one level [B, channels, H / 8, W / 8]."""
        size = features[1].shape[-2:]
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, features[1:], strict=True)]
        merged = laterals[0]
        for x in laterals[1:]:
            merged = merged + F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        return [self.output_conv(merged)]


def _init_convs(neck: nn.Module) -> None:
    for module in neck.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
