"""Normalisation layers of the backbones."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

NormLayer = Callable[[int], nn.Module]
"""Builds the layer of a number of channels."""


class FrozenBatchNorm(nn.BatchNorm2d):
    """Batch norm that always uses its stored statistics; its affine parameters are trained.

    The published models fine-tune ImageNet weights in this way (`norm_eval`).
    """

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        """Stays in evaluation mode for any `mode`."""
        super().train(False)
        return self


def build_norm(kind: str, eps: float = 1e-5) -> NormLayer:
    """Factory of a normalisation layer: `frozen_bn`, `bn` or `gn`; `eps` is added to variances."""
    if kind == "frozen_bn":
        return lambda channels: FrozenBatchNorm(channels, eps)
    if kind == "bn":
        return lambda channels: nn.BatchNorm2d(channels, eps)
    if kind == "gn":
        return lambda channels: nn.GroupNorm(_groups(channels), channels, eps)
    raise ValueError(f"norm is {kind!r}, expected frozen_bn, bn or gn")


def _groups(channels: int) -> int:
    """At most 32 groups, of four channels or more."""
    return math.gcd(min(32, channels // 4), channels)
