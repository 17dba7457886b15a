"""Focal loss of the category branch and Dice loss of the mask branch (paper, section 3.3.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def focal_loss(
    logits: Tensor, labels: Tensor, *, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Sigmoid focal loss, summed ("Focal Loss for Dense Object Detection", arXiv 1708.02002).

    Args:
        logits: [N, C].
        labels: [N] int64 in 0..C; C is the background.
        alpha: Weight of the positives.
        gamma: Exponent of the modulating factor.

    Returns:
        A scalar, the sum over N and C.
    """
    classes = logits.shape[1]
    target = F.one_hot(labels, classes + 1)[:, :classes].to(logits.dtype)
    probs = logits.sigmoid()
    miss = torch.where(target > 0, 1 - probs, probs)
    weight = torch.where(target > 0, alpha, 1 - alpha) * miss.pow(gamma)
    return (weight * F.binary_cross_entropy_with_logits(logits, target, reduction="none")).sum()


def dice_loss(probs: Tensor, target: Tensor, *, eps: float = 1e-3) -> Tensor:
    """1 - 2 sum(pq) / (sum p^2 + sum q^2) per mask.

    Args:
        probs: [P, h, w] in 0..1.
        target: [P, h, w] in 0..1.
        eps: Added to both sums of squares (0 in the paper, 1e-3 in the published code).

    Returns:
        [P]. With `eps` 0 a pair of empty masks has loss 1, not NaN.
    """
    p, q = probs.flatten(1), target.flatten(1).to(probs.dtype)
    squares = (p * p).sum(1) + (q * q).sum(1) + 2 * eps
    return 1 - 2 * (p * q).sum(1) / squares.clamp(min=torch.finfo(p.dtype).tiny)
