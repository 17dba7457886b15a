"""The training loss of a batch: focal on every cell, Dice on the positive cells only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from training.configs.schema import LossConfig
from training.losses import dice_loss, focal_loss
from training.model.head import LevelOutput
from training.model.solo import Solo
from training.targets import LevelTargets


def solo_loss(
    model: Solo,
    outputs: Sequence[LevelOutput],
    targets: Sequence[Sequence[LevelTargets]],
    config: LossConfig,
) -> dict[str, Tensor]:
    """L = L_category + 3 L_mask (paper, eq. 3; weights from `config`).

    Masks are computed for positive cells alone, level by level and image by image.

    Args:
        model: The network whose head computes the masks.
        outputs: One per level, for B images.
        targets: [B][level].
        config: Weights.

    Returns:
        `category`, `mask` (both weighted), `total`, and `num_positives` as a float tensor.
        Without a positive cell the mask loss is 0; every parameter still gets a gradient.
    """
    logits, labels, dice, unused = [], [], [], []
    for level, output in enumerate(outputs):
        logits.append(output.category_logits.permute(0, 2, 3, 1).reshape(-1, model.num_classes))
        device = output.category_logits.device
        for image, image_targets in enumerate(targets):
            target = image_targets[level]
            labels.append(torch.from_numpy(target.labels.reshape(-1)))
            if len(target.cells) == 0:
                continue
            cells = torch.from_numpy(target.cells).to(device)
            masks = torch.from_numpy(target.masks).to(device)
            factors = model.head.cell_logits(output, level, image, cells)
            probs = factors[0].sigmoid()
            for factor in factors[1:]:
                probs = probs * factor.sigmoid()
            index = torch.from_numpy(target.mask_index).to(device)
            dice.append(dice_loss(probs, masks[index], eps=config.dice_eps))
        if not any(len(image_targets[level].cells) for image_targets in targets):
            # No mask: a sum over nothing gives the level's output convolution a gradient of
            # zero. Without one, momentum and weight decay would skip it, as would other ranks.
            none = torch.zeros(0, dtype=torch.int64, device=output.category_logits.device)
            unused += [m.sum() for m in model.head.cell_logits(output, level, 0, none)]
    num_positives = sum(len(d) for d in dice)
    all_logits = torch.cat(logits)
    category = focal_loss(
        all_logits,
        torch.cat(labels).to(all_logits.device),
        alpha=config.focal_alpha,
        gamma=config.focal_gamma,
    )
    category = config.category_weight * category / (num_positives + 1)
    mask = config.mask_weight * torch.cat(dice).mean() if dice else category.new_zeros(())
    mask = sum(unused, mask)
    return {
        "category": category,
        "mask": mask,
        "total": category + mask,
        "num_positives": torch.tensor(float(num_positives)),
    }
