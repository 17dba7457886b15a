"""The training loss of a batch: focal loss of all cells, mask loss of the positive cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.configs.schema import LossConfig
from training.losses import bce_mask_loss, dice_loss, focal_loss, focal_mask_loss
from training.model.head import LevelOutput
from training.model.solo import Solo
from training.targets import LevelTargets


def mask_loss(factors: Sequence[Tensor], target: Tensor, config: LossConfig) -> Tensor:
    """The configured loss of each mask, without its weight.

    Args:
        factors: Mask logits [P, h, w], one (vanilla) or X and Y (decoupled).
        target: [P, h, w] in 0..1.
        config: The loss and its parameters.

    Returns:
        [P].
    """
    if config.mask_loss == "bce":
        return bce_mask_loss(factors, target, positive_weight=config.bce_positive_weight)
    if config.mask_loss == "focal":
        return focal_mask_loss(factors, target, alpha=config.focal_alpha, gamma=config.focal_gamma)
    probs = factors[0].sigmoid()
    for factor in factors[1:]:
        probs = probs * factor.sigmoid()
    return dice_loss(probs, target, eps=config.dice_eps)


def solo_loss(
    model: Solo,
    outputs: Sequence[LevelOutput],
    targets: Sequence[Sequence[LevelTargets]],
    config: LossConfig,
    *,
    normaliser: float | None = None,
) -> dict[str, Tensor]:
    """L = L_category + w L_mask (paper, eq. 1; w 3 for Dice; weights from `config`).

    Masks are computed only for positive cells, separately for each level and image.

    Args:
        model: The network whose head computes the masks.
        outputs: One per level, for B images.
        targets: [B][level].
        config: Weights.
        normaliser: Number of positive cells by which the sums are divided, if these images are a
            part of a larger batch; None: that of these images.

    Returns:
        `category`, `mask` (both weighted), `total`, and `num_positives` as a float tensor.
        Without a positive cell the mask loss is 0; every parameter still has a gradient.
    """
    logits, labels, per_mask, unused = [], [], [], []
    for level, output in enumerate(outputs):
        logits.append(output.category_logits.permute(0, 2, 3, 1).reshape(-1, model.num_classes))
        device = output.category_logits.device
        for image, image_targets in enumerate(targets):
            target = image_targets[level]
            labels.append(_send(target.labels.reshape(-1), device))
            if len(target.cells) == 0:
                continue
            cells, masks = _send(target.cells, device), _send(target.masks, device)
            factors = model.head.cell_logits(output, level, image, cells)
            index = _send(target.mask_index, device)
            per_mask.append(mask_loss(factors, masks[index], config))
        if not any(len(image_targets[level].cells) for image_targets in targets):
            # No mask: an empty sum gives the output convolution of the level a zero gradient.
            # Without a gradient, momentum, weight decay and the other ranks would skip it.
            none = torch.zeros(0, dtype=torch.int64, device=output.category_logits.device)
            unused += [m.sum() for m in model.head.cell_logits(output, level, 0, none)]
    num_positives = sum(len(m) for m in per_mask)
    divisor = num_positives if normaliser is None else normaliser
    all_logits = torch.cat(logits)
    category = focal_loss(
        all_logits,
        torch.cat(labels),
        alpha=config.focal_alpha,
        gamma=config.focal_gamma,
    )
    category = config.category_weight * category / (divisor + 1)
    mask = torch.cat(per_mask).sum() / divisor if per_mask else category.new_zeros(())
    mask = sum(unused, config.effective_mask_weight * mask)
    return {
        "category": category,
        "mask": mask,
        "total": category + mask,
        "num_positives": torch.tensor(float(num_positives)),
    }


def _send(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy on the device; asynchronous if the array is page-locked."""
    return torch.from_numpy(np.asarray(array)).to(device, non_blocking=True)
