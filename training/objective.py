"""The network and its loss as one module, so that DistributedDataParallel sees all of it."""

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
    """Images and targets in, loss out.

    Args:
        model: The network.
        loss: Kinds and weights.
        precision: Of the network's convolutions (autocast); weights, masks and losses are
            float32 always.
        channels_last: Whether the images are laid out as [B, H, W, 3] in memory.
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
        """The loss of a part of a step's images; the parts' losses add up to the step's.

        Args:
            images: [B, H, W, 3] uint8 RGB.
            valid_hw: [B, 2] int64.
            targets: [B][level].
            normaliser: Positive cells of all the step's images, in every process.

        Returns:
            As `solo_loss`.
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
