"""recipe="paper": the loss of a batch, pixel by pixel (section 3.3)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.support.paper import CANVAS, GRIDS, KINDS, cell_probs, objects_of, paper_config, sigmoid
from tests.support.tiny_solo import tiny_network
from training.configs.schema import Config, HeadKind, MaskLoss
from training.criterion import solo_loss
from training.targets import LevelTargets, assign_targets


def focal_sum(logits: Tensor, labels: NDArray[np.int64]) -> float:
    """Focal loss of every cell and class of one image and level; alpha 0.25, gamma 2."""
    total = 0.0
    classes, grid, _ = logits.shape
    for i in range(grid):
        for j in range(grid):
            for c in range(classes):
                p = sigmoid(logits[c, i, j].item())
                if labels[i, j] == c:
                    total -= 0.25 * (1 - p) ** 2 * math.log(p)
                else:
                    total -= 0.75 * p**2 * math.log(1 - p)
    return total


def mask_term(kind: MaskLoss, p: NDArray[np.float64], q: NDArray[np.float32]) -> float:
    """d_mask of one predicted mask p and its target q."""
    pixels = list(zip(p.ravel().tolist(), q.ravel().tolist(), strict=True))
    if kind == "dice":  # L_dice = 1 - D, D = 2 sum(p q) / (sum p^2 + sum q^2)
        top = 2 * sum(a * b for a, b in pixels)
        return 1 - top / (sum(a * a for a, _ in pixels) + sum(b * b for _, b in pixels))
    total = 0.0
    for a, b in pixels:
        if kind == "bce":  # the pixels of the object count twice
            total -= 2 * math.log(a) if b else math.log(1 - a)
        elif b:
            total -= 0.25 * (1 - a) ** 2 * math.log(a)
        else:
            total -= 0.75 * a**2 * math.log(1 - a)
    return total / len(pixels)


def random_targets(config: Config, seed: int) -> list[LevelTargets]:
    rng = np.random.default_rng(seed)
    masks = []
    for size in (6, 11, 18, 30):
        mask = np.zeros(CANVAS, np.uint8)
        y, x = int(rng.integers(0, CANVAS[0] - size)), int(rng.integers(0, CANVAS[1] - size))
        mask[y : y + size, x : x + size] = 1
        masks.append(mask)
    objects = objects_of(masks, [0, 1, 0, 1])
    return assign_targets(objects, CANVAS, config.model.head, config.targets, 2)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("mask_loss", "weight"), [("dice", 3.0), ("bce", 10.0), ("focal", 20.0)])
def test_the_loss_of_a_batch(kind: HeadKind, mask_loss: MaskLoss, weight: float) -> None:
    config = paper_config(kind, mask_loss=mask_loss)
    model = tiny_network(config)
    outputs = model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    canvas = [(m.shape[-2], m.shape[-1]) for m in (o.mask_inputs[0] for o in outputs)]
    targets = [random_targets(config, seed) for seed in (3, 4)]
    for levels in targets:  # the canvas of this test's targets is smaller than the network's
        for level, (height, width) in enumerate(canvas):
            small = levels[level].masks
            masks = np.zeros((len(small), height, width), np.float32)
            masks[:, : small.shape[1], : small.shape[2]] = small
            levels[level] = replace(levels[level], masks=masks)
    found = solo_loss(model, outputs, targets, config.loss)
    focal, terms = 0.0, []
    for level, output in enumerate(outputs):
        for image, image_targets in enumerate(targets):
            target = image_targets[level]
            focal += focal_sum(output.category_logits[image], target.labels)
            probs = cell_probs(model, output, level, image)
            for cell, row in zip(target.cells, target.mask_index, strict=True):
                i, j = divmod(int(cell), GRIDS[level])
                terms.append(mask_term(mask_loss, probs[i, j], target.masks[row]))
    assert len(terms) == found["num_positives"].item() > 6
    assert found["mask"].item() == pytest.approx(weight * sum(terms) / len(terms), rel=1e-5)
    # The paper leaves the focal loss's divisor open; one more than the positives, as published.
    assert found["category"].item() == pytest.approx(focal / (len(terms) + 1), rel=1e-5)
    assert found["total"].item() == pytest.approx((found["mask"] + found["category"]).item())
