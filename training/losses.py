"""Focal loss of the category branch; Dice, BCE and focal losses of masks (paper, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def focal_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    negatives: Tensor | None = None,
) -> Tensor:
    """Sigmoid focal loss, summed ("Focal Loss for Dense Object Detection", arXiv 1708.02002).

    Args:
        logits: [N, C].
        labels: [N] int64 in 0..C; C is the background.
        alpha: Weight of the positives.
        gamma: Exponent of the modulating factor.
        negatives: [N, C] bool, whether the absence of a class is known where it is not the label;
            where it is not, there is neither a loss nor a gradient. None: it is known everywhere.

    Returns:
        A scalar, the sum over N and C.
    """
    classes = logits.shape[1]
    target = F.one_hot(labels, classes + 1)[:, :classes].to(logits.dtype)
    probs = logits.sigmoid()
    miss = torch.where(target > 0, 1 - probs, probs)
    weight = torch.where(target > 0, alpha, 1 - alpha) * miss.pow(gamma)
    loss = weight * F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if negatives is not None:
        loss = loss.masked_fill(~negatives & (target == 0), 0)
    return loss.sum()


def dice_loss(probs: Tensor, target: Tensor, *, eps: float = 1e-3) -> Tensor:
    """1 - 2 sum(pq) / (sum p^2 + sum q^2) per mask.

    Args:
        probs: [P, h, w] in 0..1.
        target: [P, h, w] in 0..1.
        eps: Added to both sums of squares (0 in the paper, 1e-3 in the published code).

    Returns:
        [P]. With `eps` 0, the loss of two empty masks is 1, not NaN.
    """
    p, q = probs.flatten(1), target.flatten(1).to(probs.dtype)
    squares = (p * p).sum(1) + (q * q).sum(1) + 2 * eps
    return 1 - 2 * (p * q).sum(1) / squares.clamp(min=torch.finfo(p.dtype).tiny)


def bce_mask_loss(
    factors: Sequence[Tensor], target: Tensor, *, positive_weight: float = 2.0
) -> Tensor:
    """Binary cross-entropy, mean over the pixels of each mask (the paper's ablation).

    Args:
        factors: Mask logits, one tensor [P, h, w] (vanilla) or X and Y (decoupled); the
            probability is the product of their sigmoids.
        target: [P, h, w] in 0..1.
        positive_weight: Factor of the object's pixels (paper: 2).

    Returns:
        [P].
    """
    log_p, log_q = _log_probs(factors)
    target = target.to(log_p.dtype)
    loss = positive_weight * target * log_p + (1 - target) * log_q
    return -loss.flatten(1).mean(1)


def focal_mask_loss(
    factors: Sequence[Tensor], target: Tensor, *, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Focal loss, mean over the pixels of each mask (the paper's ablation, and contours).

    Args:
        factors: As in `bce_mask_loss`.
        target: [P, h, w] in 0..1.
        alpha: Weight of the object's pixels.
        gamma: Exponent of the modulating factor.

    Returns:
        [P].
    """
    log_p, log_q = _log_probs(factors)
    target = target.to(log_p.dtype)
    inside = alpha * (gamma * log_q).exp() * log_p
    outside = (1 - alpha) * (gamma * log_p).exp() * log_q
    return -(target * inside + (1 - target) * outside).flatten(1).mean(1)


def _log_probs(factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """log(p) and log(1 - p) of a product of sigmoids p, without rounding p to 0 or 1."""
    first, *others = (f if f.dtype == torch.float64 else f.float() for f in factors)
    log_p, log_q = F.logsigmoid(first), F.logsigmoid(-first)
    for factor in others:  # 1 - p s = (1 - p) + p (1 - s)
        log_q = torch.logaddexp(log_q, log_p + F.logsigmoid(-factor))
        log_p = log_p + F.logsigmoid(factor)
    return log_p, log_q
