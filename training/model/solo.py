"""SOLO end to end: uint8 images in, ranked candidates out (paper, sections 3 and 3.4).

Symbols: B batch, C classes, K candidates, S grid, H W canvas, h w mask at the finest stride.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.configs.schema import BackboneKind, NetworkConfig
from training.model.efficientnet import EfficientNetLite0
from training.model.fpn import FPN, SingleLevel
from training.model.head import LevelOutput, SoloHead
from training.model.resnet import ResNet

BACKBONES: dict[BackboneKind, type[ResNet] | type[EfficientNetLite0]] = {
    "resnet": ResNet,
    "efficientnet_lite0": EfficientNetLite0,
}


def points_nms(probs: Tensor) -> Tensor:
    """Keeps a category probability only if no neighbour above or to the left is higher.

    A 2x2 maximum with padding 1, as in the published code; ties are kept.

    Args:
        probs: [B, C, S, S].

    Returns:
        [B, C, S, S] with the suppressed entries zero.
    """
    peak = F.max_pool2d(probs, 2, stride=1, padding=1)[..., :-1, :-1]
    return probs * (peak == probs)


class Solo(nn.Module):
    """Backbone, neck and head.

    Args:
        config: The network.
        num_classes: C, background excluded.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    candidate_level: Tensor

    def __init__(self, config: NetworkConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.backbone = BACKBONES[config.backbone.kind](config.backbone)
        channels, width = self.backbone.out_channels, config.neck_channels
        self.neck = (
            SingleLevel(channels, width)
            if config.neck == "single"
            else FPN(channels, width, len(config.head.num_grids))
        )
        self.head = SoloHead(config.head, width, num_classes, self.neck.first_stride)
        mean, std = self.backbone.pixel_mean, self.backbone.pixel_std  # RGB, of 0..255
        self.register_buffer("pixel_mean", torch.tensor(mean)[:, None, None], False)
        self.register_buffer("pixel_std", torch.tensor(std)[:, None, None], False)
        level = torch.cat([torch.full((s * s,), i) for i, s in enumerate(config.head.num_grids)])
        self.register_buffer("candidate_level", level, False)

    def normalise(self, images: Tensor, valid_hw: Tensor) -> Tensor:
        """Normalises the images and sets the padding to zero.

        Args:
            images: [B, H, W, 3] uint8 RGB.
            valid_hw: [B, 2] int64, height and width of the image on the canvas.

        Returns:
            [B, 3, H, W] float32.
        """
        # Cast first: the only operation on uint8 inputs that TensorRT supports.
        x = (images.float().permute(0, 3, 1, 2) - self.pixel_mean) / self.pixel_std
        rows = torch.arange(images.shape[1], device=images.device) < valid_hw[:, :1]
        columns = torch.arange(images.shape[2], device=images.device) < valid_hw[:, 1:]
        return x * (rows[:, None, :, None] & columns[:, None, None, :])

    def forward(self, x: Tensor) -> list[LevelOutput]:
        """Normalised images [B, 3, H, W], H and W divisible by 32 -> one output per level."""
        outputs: list[LevelOutput] = self.head(self.neck(self.backbone(x)))
        return outputs

    def candidates(self, images: Tensor, valid_hw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The exported graph: candidates of canvases before NMS, best first.

        Args:
            images: [B, H, W, 3] uint8 RGB, H and W divisible by 32.
            valid_hw: [B, 2] int64.

        Returns:
            scores [B, K] float32 (0: no candidate), labels [B, K] int64 and mask
            probabilities [B, K, h, w] float32 at the finest mask stride.
        """
        return self.rank(self(self.normalise(images, valid_hw)))

    def rank(self, outputs: Sequence[LevelOutput]) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs of the head for a batch -> candidates, as `candidates` returns them."""
        scores, labels, cells = self._select(outputs)
        probs = self._candidate_probs(outputs, cells)
        if self.config.recipe == "published":
            scores = scores * self._maskness(probs, cells)
            scores, order = scores.sort(dim=1, descending=True, stable=True)
            labels = labels.gather(1, order)
            batch = torch.arange(probs.shape[0], device=probs.device)[:, None]
            probs = probs[batch, order]
        return scores, labels, probs

    def _select(self, outputs: Sequence[LevelOutput]) -> tuple[Tensor, Tensor, Tensor]:
        """Top K of all cells and classes: scores, labels and flat cell indices, [B, K] each."""
        flat = []
        for output in outputs:
            probs = output.category_logits.sigmoid()
            if self.config.recipe == "published":
                probs = points_nms(probs)
            flat.append(probs.flatten(2))
        probs = torch.cat(flat, dim=2).transpose(1, 2).flatten(1)  # [B, cells * C]
        scores, index = probs.topk(min(self.config.candidates, probs.shape[1]), dim=1)
        scores = scores * (scores > self.config.candidate_threshold)
        return scores, index % self.num_classes, index // self.num_classes

    def _candidate_probs(self, outputs: Sequence[LevelOutput], cells: Tensor) -> Tensor:
        """Mask probabilities [B, K, h, w] of flat cell indices [B, K], at the finest stride."""
        strides = self.config.head.mask_strides
        finest = outputs[strides.index(min(strides))].mask_inputs[0].shape[-2:]
        batch = torch.arange(cells.shape[0], device=cells.device)[:, None]
        grids = self.config.head.num_grids
        level = self.candidate_level[cells]
        offset = 0
        if self.head.decoupled:
            xs = torch.cat([_resize(o.mask_inputs[0].sigmoid(), finest) for o in outputs], 1)
            ys = torch.cat([_resize(o.mask_inputs[1].sigmoid(), finest) for o in outputs], 1)
            column = torch.zeros_like(cells)
            row = torch.zeros_like(cells)
            axis = 0  # first channel of the level in xs and ys
            for index, grid in enumerate(grids):
                here = level == index
                column = torch.where(here, axis + (cells - offset) % grid, column)
                row = torch.where(here, axis + (cells - offset) // grid, row)
                offset, axis = offset + grid * grid, axis + grid
            return xs[batch, column] * ys[batch, row]
        probs = None
        for index, (output, grid) in enumerate(zip(outputs, grids, strict=True)):
            conv = self.head.mask_out[index]
            assert isinstance(conv, nn.Conv2d) and conv.bias is not None
            inside = (cells - offset).clamp(0, grid * grid - 1)
            features = output.mask_inputs[0]
            logits = torch.matmul(conv.weight.flatten(1)[inside], features.flatten(2))
            logits = logits + conv.bias[inside][..., None]
            logits = logits.unflatten(2, features.shape[-2:])  # type: ignore[no-untyped-call]
            maps = _resize(logits.sigmoid(), finest)
            here = (level == index)[..., None, None]
            probs = maps if probs is None else torch.where(here, maps, probs)
            offset += grid * grid
        assert probs is not None
        return probs

    def _maskness(self, probs: Tensor, cells: Tensor) -> Tensor:
        """Mean probability over each mask; 0 if its area does not exceed the level's stride."""
        strides = torch.tensor(self.config.head.level_strides, device=cells.device)
        exact = torch.promote_types(probs.dtype, torch.float32)
        inside = (probs > self.config.mask_threshold).to(probs.dtype)
        # Areas of half precision: fp16 overflows at 65,504 px, bf16 rounds above 256.
        area = inside.sum(dim=(2, 3), dtype=exact)
        mean = (probs * inside).sum(dim=(2, 3), dtype=exact) / area.clamp(min=1)
        return mean * (area > strides[self.candidate_level[cells]])


def _resize(probs: Tensor, size: torch.Size) -> Tensor:
    if probs.shape[-2:] == size:
        return probs
    return F.interpolate(probs, size=size, mode="bilinear", align_corners=False)
