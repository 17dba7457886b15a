"""SOLO heads: vanilla, Decoupled and Decoupled Light (paper, sections 3.2 and 5).

Symbols: B batch, C classes, S grid, L levels, h w mask size of a level, P selected cells.
A cell is (level, i, j) with row i and column j.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.configs.schema import HeadConfig
from training.model.deform import DeformConv2d, reset_offsets

CATEGORY_PRIOR = 0.01


def prior_bias(prior: float) -> float:
    """Bias whose sigmoid is `prior`; 0.01 gives the published -4.59512."""
    return -math.log((1 - prior) / prior)


@dataclass
class LevelOutput:
    """Output of the head for one pyramid level.

    Attributes:
        category_logits: [B, C, S, S].
        mask_inputs: Vanilla: the features [B, c, h, w], the input of `mask_out`, which has S^2
            output channels; decoupled: the logits X and Y, [B, S, h, w] each.
    """

    category_logits: Tensor
    mask_inputs: tuple[Tensor, ...]


def coordinate_channels(features: Tensor, octaves: int = 0) -> tuple[Tensor, Tensor]:
    """Coordinates in [-1, 1] for CoordConv, x along the width and y along the height.

    Args:
        features: [B, c, h, w]; only shape, dtype and device are used.
        octaves: Appends sin and cos of pi * 2^k * coordinate for k < octaves.

    Returns:
        x and y, [B, 1 + 2 * octaves, h, w] each. A side of one pixel has coordinate -1.
    """
    batch, _, height, width = features.shape
    # bf16 cannot represent odd integers above 256 or small steps of the coordinates.
    exact = torch.promote_types(features.dtype, torch.float32)
    ramps = []
    for side in (width, height):
        # arange, not linspace: height and width must be symbolic in the exported graph. The divisor
        # comes from the tensor: one that comes from the shape is a scalar on the host there.
        steps = torch.arange(side, dtype=exact, device=features.device)
        ramp = steps * 2 / steps.amax(0).clamp(min=1) - 1
        waves = [ramp]
        for k in range(octaves):
            waves += [torch.sin(math.pi * 2**k * ramp), torch.cos(math.pi * 2**k * ramp)]
        ramps.append(torch.stack(waves).to(features.dtype))
    x = ramps[0][None, :, None, :].expand(batch, -1, height, -1)
    y = ramps[1][None, :, :, None].expand(batch, -1, -1, width)
    return x, y


class ConvNormRelu(nn.Module):
    """3x3 convolution without bias, regular or deformable; GroupNorm; ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, groups: int, deformable: bool = False
    ) -> None:
        super().__init__()
        conv = DeformConv2d if deformable else nn.Conv2d
        self.conv = conv(in_channels, out_channels, 3, padding=1, bias=False)
        self.gn = nn.GroupNorm(groups, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, h, w] -> [B, out, h, w]."""
        # In place: the backward pass does not need the norm's output; saves a third of the memory.
        return F.relu(self.gn(self.conv(x)), inplace=True)


def resize_levels(
    features: Sequence[Tensor], level_strides: Sequence[int], first_stride: int = 4
) -> list[Tensor]:
    """Resizes P2, P3, ... to the strides of the head (paper: 8, 8, 16, 32, 32).

    Args:
        features: Levels, finest first; each has twice the stride of the previous one.
        level_strides: Target stride per level, px.
        first_stride: Stride of the first level, px.
    """
    sizes = {first_stride * 2**i: x.shape[-2:] for i, x in enumerate(features)}
    resized = []
    for i, (x, wanted) in enumerate(zip(features, level_strides, strict=True)):
        stride = first_stride * 2**i
        if wanted == 2 * stride:
            x = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
        elif wanted in sizes and wanted != stride:
            x = F.interpolate(x, size=sizes[wanted], mode="bilinear", align_corners=False)
        elif wanted != stride:
            raise ValueError(f"level {i} of stride {stride} cannot be resized to stride {wanted}")
        resized.append(x)
    return resized


REGION_SAMPLES = 3
"""Samples along each axis of a cell in the region-grid alignment."""


def align_to_grid(x: Tensor, grid: int, method: str) -> Tensor:
    """Resizes the features of a level to one vector per grid cell (paper, section 4.3).

    Args:
        x: [B, c, h, w].
        grid: S.
        method: `interpolate`, `adaptive_max_pool` or `region_grid`.

    Returns:
        [B, c, S, S].
    """
    if method == "adaptive_max_pool":
        return _pool_axis(_pool_axis(x, grid, 2), grid, 3)
    if method == "region_grid":
        # Half-pixel bilinear resizing to S * n samples at the centres of n x n parts of each cell.
        fine = grid * REGION_SAMPLES
        x = F.interpolate(x, size=(fine, fine), mode="bilinear", align_corners=False)
        return F.avg_pool2d(x, REGION_SAMPLES)
    return F.interpolate(x, size=(grid, grid), mode="bilinear", align_corners=False)


def _pool_axis(x: Tensor, grid: int, axis: int) -> Tensor:
    """Adaptive max-pool along one axis by gathering, as its size can be symbolic in a graph."""
    size = x.shape[axis]
    cells = torch.arange(grid, device=x.device)
    first, last = cells * size // grid, ((cells + 1) * size + grid - 1) // grid - 1
    steps = torch.arange(size // grid + 2, device=x.device)
    index = torch.minimum(first[:, None] + steps, last[:, None])
    cells_of = x.index_select(axis, index.flatten()).unflatten(axis, (grid, -1))  # type: ignore[no-untyped-call]
    pooled: Tensor = cells_of.amax(axis + 1)
    return pooled


class SoloHead(nn.Module):
    """Category and mask branches; levels share all weights but the mask output convolutions.

    Args:
        config: Configuration of the head.
        in_channels: Channels of the pyramid.
        num_classes: C, background excluded.
        first_stride: Stride of the neck's finest level, px.
    """

    def __init__(
        self, config: HeadConfig, in_channels: int, num_classes: int, first_stride: int = 4
    ) -> None:
        super().__init__()
        self.config = config
        self.first_stride = first_stride
        self.num_classes = num_classes
        self.decoupled = config.kind != "vanilla"
        ramps = 1 + 2 * config.coord_octaves
        width, kernel = config.channels, config.mask_kernel
        self.category_convs = self._tower(in_channels, 0)
        self.category_out = nn.Conv2d(
            width, num_classes, config.category_kernel, padding=config.category_kernel // 2
        )
        grids = config.num_grids
        if config.kind == "decoupled":
            self.mask_convs_x = self._tower(in_channels, ramps)
            self.mask_convs_y = self._tower(in_channels, ramps)
        else:
            self.mask_convs = self._tower(in_channels, 2 * ramps)
        if self.decoupled:
            self.mask_out_x = nn.ModuleList(
                nn.Conv2d(width, s, kernel, padding=kernel // 2) for s in grids
            )
            self.mask_out_y = nn.ModuleList(
                nn.Conv2d(width, s, kernel, padding=kernel // 2) for s in grids
            )
        else:
            self.mask_out = nn.ModuleList(nn.Conv2d(width, s * s, 1) for s in grids)
        self._init_weights()

    def _tower(self, in_channels: int, coords: int) -> nn.ModuleList:
        config = self.config
        return nn.ModuleList(
            ConvNormRelu(
                (config.channels if i else in_channels)
                + (coords if i < config.num_coord_convs else 0),
                config.channels,
                config.norm_groups,
                deformable=config.deformable and i == config.num_convs - 1,
            )
            for i in range(config.num_convs)
        )

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.constant_(module.bias, prior_bias(self.config.mask_prior))
        reset_offsets(self)
        assert self.category_out.bias is not None
        nn.init.constant_(self.category_out.bias, prior_bias(CATEGORY_PRIOR))

    def forward(self, features: Sequence[Tensor]) -> list[LevelOutput]:
        """Pyramid levels [B, c, H / s, W / s] -> one `LevelOutput` per level."""
        levels = resize_levels(features, self.config.level_strides, self.first_stride)
        return [
            LevelOutput(self._categories(x, level), self._masks(x, level))
            for level, x in enumerate(levels)
        ]

    def _categories(self, x: Tensor, level: int) -> Tensor:
        x = align_to_grid(x, self.config.num_grids[level], self.config.align)
        for conv in self.category_convs:
            x = conv(x)
        logits: Tensor = self.category_out(x)
        return logits

    def _masks(self, x: Tensor, level: int) -> tuple[Tensor, ...]:
        coords = coordinate_channels(x, self.config.coord_octaves)
        if self.config.kind == "decoupled":
            towers = [self.mask_convs_x, self.mask_convs_y]
            seen: list[tuple[Tensor, ...]] = [coords[:1], coords[1:]]
        else:
            towers, seen = [self.mask_convs], [coords]
        features = [
            self._upsample(self._run(t, x, c), level) for t, c in zip(towers, seen, strict=True)
        ]
        if not self.decoupled:
            return tuple(features)
        return self.mask_out_x[level](features[0]), self.mask_out_y[level](features[-1])

    def _run(self, tower: nn.ModuleList, x: Tensor, coords: Sequence[Tensor]) -> Tensor:
        for i, conv in enumerate(tower):
            x = conv(torch.cat([x, *coords], dim=1) if i < self.config.num_coord_convs else x)
        return x

    def _upsample(self, x: Tensor, level: int) -> Tensor:
        factor = self.config.level_strides[level] // self.config.mask_strides[level]
        if factor == 1:
            return x
        return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)

    def cell_logits(
        self, output: LevelOutput, level: int, image: int, cells: Tensor
    ) -> tuple[Tensor, ...]:
        """Mask logits of the given cells of one image; other masks are not computed.

        Args:
            output: Output of the level.
            level: Index of the level.
            image: Index in the batch.
            cells: [P] int64, i * S + j.

        Returns:
            Vanilla: one tensor [P, h, w]; decoupled: X and Y, [P, h, w] each. The mask
            probability is the product of their sigmoids.
        """
        if self.decoupled:
            grid = self.config.num_grids[level]
            x, y = output.mask_inputs
            return x[image].index_select(0, cells % grid), y[image].index_select(0, cells // grid)
        conv = self.mask_out[level]
        assert isinstance(conv, nn.Conv2d) and conv.bias is not None
        features = output.mask_inputs[0][image]
        weight = conv.weight.flatten(1).index_select(0, cells)
        logits = torch.addmm(conv.bias[cells, None], weight, features.flatten(1))
        return (logits.unflatten(1, features.shape[1:]),)  # type: ignore[no-untyped-call]
