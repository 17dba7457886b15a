from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from training.losses import dice_loss, focal_loss


def test_focal_loss_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (20, 4))
    labels = rng.integers(0, 5, 20)
    expected = 0.0
    for row, label in zip(logits, labels, strict=True):
        for c, z in enumerate(row):
            p = 1 / (1 + math.exp(-z))
            if c == label:
                expected -= 0.3 * (1 - p) ** 1.5 * math.log(p)
            else:
                expected -= 0.7 * p**1.5 * math.log(1 - p)
    found = focal_loss(torch.tensor(logits), torch.tensor(labels), alpha=0.3, gamma=1.5)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_focal_loss_of_background_counts_every_class() -> None:
    logits = torch.zeros(1, 3)
    assert focal_loss(logits, torch.tensor([3])).item() == pytest.approx(
        3 * 0.75 * 0.25 * math.log(2)
    )


@pytest.mark.parametrize("size", [0.0, 60.0, 200.0])
def test_focal_loss_and_gradient_stay_finite(size: float) -> None:
    logits = torch.tensor([[size, -size]], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([1]))
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_focal_loss_of_nothing_is_zero() -> None:
    assert focal_loss(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)).item() == 0


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_dice_loss_by_brute_force(eps: float) -> None:
    rng = np.random.default_rng(1)
    probs, target = rng.random((5, 6, 7)), (rng.random((5, 6, 7)) > 0.6).astype(float)
    expected = []
    for p, q in zip(probs, target, strict=True):
        top = 2 * sum(a * b for a, b in zip(p.flat, q.flat, strict=True))
        bottom = sum(a * a for a in p.flat) + eps + sum(b * b for b in q.flat) + eps
        expected.append(1 - top / bottom)
    found = dice_loss(torch.tensor(probs), torch.tensor(target), eps=eps)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_dice_loss_of_a_perfect_mask_is_zero() -> None:
    mask = torch.zeros(1, 4, 4)
    mask[0, 1:3] = 1
    assert dice_loss(mask, mask, eps=0.0).item() == 0
    assert dice_loss(mask, 1 - mask, eps=0.0).item() == 1


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_dice_loss_of_empty_masks_is_one(eps: float) -> None:
    probs = torch.zeros(1, 4, 4, requires_grad=True)
    loss = dice_loss(probs, torch.zeros(1, 4, 4), eps=eps)
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 1
    assert probs.grad is not None and torch.isfinite(probs.grad).all()


def test_dice_loss_takes_integer_targets() -> None:
    target = torch.ones(2, 3, 3, dtype=torch.uint8)
    assert dice_loss(torch.full((2, 3, 3), 0.5), target).dtype == torch.float32
