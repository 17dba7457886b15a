from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from training.losses import bce_mask_loss, dice_loss, focal_loss, focal_mask_loss

MaskLoss = Callable[..., Any]


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


FACTORS = pytest.mark.parametrize("factors", [1, 2], ids=["vanilla", "decoupled"])


def mask_logits(factors: int, spread: float = 3.0) -> list[torch.Tensor]:
    rng = np.random.default_rng(factors)
    return [torch.tensor(rng.normal(0, spread, (4, 5, 6))) for _ in range(factors)]


def mask_targets() -> torch.Tensor:
    """Four masks: one of fractions, an empty one, a full one, a binary one."""
    rng = np.random.default_rng(9)
    return torch.tensor(
        np.stack([rng.random((5, 6)), np.zeros((5, 6)), np.ones((5, 6)), rng.random((5, 6)) > 0.7])
    ).double()


def naive(logits: list[torch.Tensor], row: int, y: int, x: int) -> float:
    """p of one pixel by the definition."""
    return math.prod(1 / (1 + math.exp(-factor[row, y, x].item())) for factor in logits)


@FACTORS
@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_bce_mask_loss_by_brute_force(factors: int, weight: float) -> None:
    logits, target = mask_logits(factors), mask_targets()
    expected = []
    for row in range(4):
        total = 0.0
        for y in range(5):
            for x in range(6):
                p, t = naive(logits, row, y, x), target[row, y, x].item()
                total -= weight * t * math.log(p) + (1 - t) * math.log(1 - p)
        expected.append(total / 30)
    found = bce_mask_loss(logits, target, positive_weight=weight)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)
    single = bce_mask_loss([f.float() for f in logits], target, positive_weight=weight)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, rtol=1e-5)


@FACTORS
@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 0.5), (0.5, 0.0)])
def test_focal_mask_loss_by_brute_force(factors: int, alpha: float, gamma: float) -> None:
    logits, target = mask_logits(factors), mask_targets()
    expected = []
    for row in range(4):
        total = 0.0
        for y in range(5):
            for x in range(6):
                p, t = naive(logits, row, y, x), target[row, y, x].item()
                total -= t * alpha * (1 - p) ** gamma * math.log(p)
                total -= (1 - t) * (1 - alpha) * p**gamma * math.log(1 - p)
        expected.append(total / 30)
    found = focal_mask_loss(logits, target, alpha=alpha, gamma=gamma)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)
    single = focal_mask_loss([f.float() for f in logits], target, alpha=alpha, gamma=gamma)
    np.testing.assert_allclose(single.numpy(), expected, rtol=1e-5)


@FACTORS
@pytest.mark.parametrize("loss", [bce_mask_loss, focal_mask_loss])
def test_gradients_of_mask_losses_by_finite_differences(factors: int, loss: MaskLoss) -> None:
    logits = [f.requires_grad_() for f in mask_logits(factors)]
    target = mask_targets()
    assert torch.autograd.gradcheck(lambda *f: loss(f, target), logits)


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_gradient_of_dice_by_finite_differences(eps: float) -> None:
    probs = torch.tensor(np.random.default_rng(2).random((4, 5, 6)), requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: dice_loss(p, mask_targets(), eps=eps), [probs])


@FACTORS
@pytest.mark.parametrize("loss", [bce_mask_loss, focal_mask_loss])
def test_a_sure_mistake_still_has_its_loss_and_gradient(factors: int, loss: MaskLoss) -> None:
    """Logits of 50: in float32 p is 1, and ln(1 - p) is -50 (+ ln 2 for two factors), not -inf."""
    logits = [torch.full((1, 2, 2), 50.0, requires_grad=True) for _ in range(factors)]
    found = loss(logits, torch.zeros(1, 2, 2))
    found.sum().backward()
    weight = 1.0 if loss is bce_mask_loss else 0.75
    assert found.item() == pytest.approx(weight * (50 - (factors - 1) * math.log(2)), rel=1e-6)
    for factor in logits:
        assert factor.grad is not None
        np.testing.assert_allclose(factor.grad.numpy(), weight / factors / 4, rtol=1e-5)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@FACTORS
@pytest.mark.parametrize("loss", [bce_mask_loss, focal_mask_loss])
def test_mask_losses_of_extreme_logits_are_finite(
    factors: int, loss: MaskLoss, sign: float
) -> None:
    logits = [torch.full((2, 1, 1), sign * 1e4, requires_grad=True) for _ in range(factors)]
    found = loss(logits, torch.tensor([0.0, 1.0])[:, None, None])
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert all(f.grad is not None and torch.isfinite(f.grad).all() for f in logits)


@FACTORS
@pytest.mark.parametrize("loss", [bce_mask_loss, focal_mask_loss])
def test_mask_losses_of_half_precision_are_computed_in_single(factors: int, loss: MaskLoss) -> None:
    logits = [f.half() for f in mask_logits(factors)]
    found = loss(logits, mask_targets())
    assert found.dtype == torch.float32
    expected = loss([f.double() for f in logits], mask_targets())
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-5)


@FACTORS
@pytest.mark.parametrize("loss", [bce_mask_loss, focal_mask_loss])
def test_mask_losses_of_no_masks(factors: int, loss: MaskLoss) -> None:
    assert loss([torch.zeros(0, 3, 3)] * factors, torch.zeros(0, 3, 3)).shape == (0,)
