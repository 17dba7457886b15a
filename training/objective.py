"""The network and its loss as one module, for DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from training.configs.schema import LossConfig
from training.criterion import solo_loss
from training.model.head import LevelOutput
from training.model.solo import Solo
from training.targets import LevelTargets

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Objective(nn.Module):
    """Computes the loss from images and targets.

    Args:
        model: The network.
        loss: Losses and their weights.
        precision: Of the network's convolutions (autocast); weights, masks and losses are
            always float32.
        channels_last: Whether the memory layout of the images is [B, H, W, 3].
    """

    def __init__(
        self,
        model: Solo,
        loss: LossConfig,
        *,
        precision: Precision = "fp32",
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if precision not in DTYPES:
            raise ValueError(f"precision is {precision!r}, expected one of {', '.join(DTYPES)}")
        self.model, self.loss, self.precision = model, loss, precision
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    def forward(
        self,
        images: Tensor,
        valid_hw: Tensor,
        targets: Sequence[Sequence[LevelTargets]],
        normaliser: float,
    ) -> dict[str, Tensor]:
        """The loss of some of the images of a step; the losses of all parts add up to the step's.

        Args:
            images: [B, H, W, 3] uint8 RGB.
            valid_hw: [B, 2] int64.
            targets: [B][level].
            normaliser: Positive cells of all images of the step, over all processes.

        Returns:
            The losses that `solo_loss` returns.
        """
        x = self.model.normalise(images, valid_hw).contiguous(memory_format=self.layout)
        mixed = self.precision != "fp32"
        with torch.autocast(x.device.type, DTYPES[self.precision], enabled=mixed):
            outputs = self.model(x)
        outputs = [
            LevelOutput(o.category_logits.float(), tuple(m.float() for m in o.mask_inputs))
            for o in outputs
        ]
        return solo_loss(self.model, outputs, targets, self.loss, normaliser=normaliser)
