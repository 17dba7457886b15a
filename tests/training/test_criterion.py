from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support.tiny import TINY, TINY_SGD, disc
from training.configs.schema import Config, LossConfig, MaskLoss
from training.criterion import solo_loss
from training.losses import dice_loss, focal_loss
from training.model.head import LevelOutput
from training.model.solo import Solo
from training.targets import LevelTargets, Objects, assign_targets

CANVAS = (64, 64)
BOTH = pytest.mark.parametrize("config", [TINY, TINY_SGD], ids=["light", "vanilla"])


def build(config: Config) -> Solo:
    torch.manual_seed(0)
    model = Solo(
        replace(config.model, backbone=replace(config.model.backbone, norm="gn", frozen_stages=0)),
        config.num_classes,
    )
    for parameter in model.head.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def targets_of(config: Config, *radii: float) -> list[LevelTargets]:
    masks = [disc(*CANVAS, 20 + 24 * i, 20 + 20 * i, r) for i, r in enumerate(radii)]
    boxes = [
        [20 + 20 * i - r, 20 + 24 * i - r, 20 + 20 * i + r, 20 + 24 * i + r]
        for i, r in enumerate(radii)
    ]
    objects = Objects(
        np.stack(masks) if masks else np.zeros((0, *CANVAS), np.uint8),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.arange(len(radii)) % 2,
    )
    return assign_targets(objects, CANVAS, config.model.head, config.targets, 2)


@BOTH
def test_against_the_formula_over_every_cell(config: Config) -> None:
    model = build(config)
    outputs = model(torch.randn(2, 3, *CANVAS))
    targets = [targets_of(config, 6.0, 12.0), targets_of(config, 9.0)]
    weights = LossConfig(category_weight=0.5, mask_weight=2.0, dice_eps=0.01, focal_gamma=1.0)
    found = solo_loss(model, outputs, targets, weights)
    focal, dice = torch.zeros(()), []
    for level, output in enumerate(outputs):
        grid = config.model.head.num_grids[level]
        for image in range(2):
            target = targets[image][level]
            logits = output.category_logits[image].flatten(1).T
            focal = focal + focal_loss(logits, torch.tensor(target.labels).flatten(), gamma=1.0)
            for cell, row in zip(target.cells, target.mask_index, strict=True):
                i, j = divmod(int(cell), grid)
                if model.head.decoupled:
                    x, y = output.mask_inputs
                    mask = x[image, j].sigmoid() * y[image, i].sigmoid()
                else:
                    mask = model.head.mask_out[level](output.mask_inputs[0])[image, cell].sigmoid()
                dice.append(
                    dice_loss(mask[None], torch.from_numpy(target.masks[row][None]), eps=0.01)
                )
    assert len(dice) == found["num_positives"].item() > 4
    assert found["category"].item() == pytest.approx(0.5 * focal.item() / (len(dice) + 1), rel=1e-5)
    assert found["mask"].item() == pytest.approx(2 * torch.cat(dice).mean().item(), rel=1e-5)
    assert found["total"].item() == pytest.approx((found["category"] + found["mask"]).item())


@BOTH
def test_masks_are_computed_for_positive_cells_alone(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(config)
    outputs = model(torch.randn(2, 3, *CANVAS))
    targets = [targets_of(config, 6.0), targets_of(config, 12.0, 5.0)]
    asked = []
    original = model.head.cell_logits

    def counting(output, level, image, cells):  # type: ignore[no-untyped-def]
        asked.append(len(cells))
        return original(output, level, image, cells)

    monkeypatch.setattr(model.head, "cell_logits", counting)
    found = solo_loss(model, outputs, targets, LossConfig())
    assert sum(asked) == found["num_positives"].item()
    for output in outputs:
        for mask in output.mask_inputs:
            assert mask.shape[1] < 64  # never S^2 channels


@BOTH
def test_no_objects(config: Config) -> None:
    model = build(config)
    outputs = model(torch.randn(2, 3, *CANVAS))
    found = solo_loss(model, outputs, [targets_of(config), targets_of(config)], LossConfig())
    assert found["mask"].item() == 0 and found["num_positives"].item() == 0
    assert found["category"].item() > 0
    found["total"].backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in gradients.items():
        assert gradient is not None and torch.isfinite(gradient).all(), name
    of_masks = {name: g for name, g in gradients.items() if name.startswith("head.mask")}
    assert of_masks
    for name, gradient in of_masks.items():
        assert (gradient == 0).all(), name  # type: ignore[union-attr]
    assert model.head.category_out.weight.grad.abs().max() > 0  # type: ignore[union-attr]


@BOTH
def test_a_level_without_objects_gets_a_gradient_of_zero(config: Config) -> None:
    model = build(config)
    outputs = model(torch.randn(1, 3, *CANVAS))
    targets = [targets_of(config, 5.0)]
    assert [len(t.cells) > 0 for t in targets[0]] == [True, False]
    solo_loss(model, outputs, targets, LossConfig())["total"].backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    of_masks = {name: g for name, g in gradients.items() if name.startswith("head.mask_out")}
    empty = [name for name in of_masks if ".1." in name]
    assert empty
    assert [name for name, g in of_masks.items() if not g.any()] == empty  # type: ignore[union-attr]


def test_one_class() -> None:
    config = replace(TINY, num_classes=1)
    model = Solo(config.model, 1)
    outputs = model(torch.randn(2, 3, *CANVAS))
    target = targets_of(config, 8.0)
    labels = [replace(t, labels=np.where(t.labels == 2, 1, 0).astype(np.int64)) for t in target]
    found = solo_loss(model, outputs, [labels, labels], LossConfig())
    assert torch.isfinite(found["total"])


def test_training_on_one_image_learns_its_mask() -> None:
    model = build(TINY).train()
    image = torch.zeros(1, 3, *CANVAS)
    image[0, :, 8:33, 8:33] = torch.tensor(disc(25, 25, 12, 12, 12), dtype=torch.float32)
    targets = [targets_of(TINY, 12.0)]
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    losses = []
    for _ in range(25):
        found = solo_loss(model, model(image), targets, LossConfig())
        optimizer.zero_grad()
        found["total"].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(found["mask"].item() / 3)
    assert losses[-1] < 0.4 < losses[0]


def test_the_category_loss_does_not_see_masks() -> None:
    model = build(TINY)
    outputs = model(torch.randn(1, 3, *CANVAS))
    target = targets_of(TINY, 10.0)
    other = [replace(t, masks=1 - np.asarray(t.masks)) for t in target]
    a = solo_loss(model, outputs, [target], LossConfig())
    b = solo_loss(model, outputs, [other], LossConfig())
    assert a["category"].item() == b["category"].item()
    assert a["mask"].item() != b["mask"].item()
    assert F.relu(a["total"]).item() == a["total"].item()


@pytest.mark.parametrize("mask_loss", ["dice", "bce", "focal"])
def test_cropped_masks_give_the_same_loss_and_gradients_bit_for_bit(mask_loss: MaskLoss) -> None:
    config = LossConfig(mask_loss=mask_loss)
    cropped = [targets_of(TINY, 6.0, 12.0), targets_of(TINY, 9.0)]
    dense = [[replace(t, masks=np.asarray(t.masks)) for t in levels] for levels in cropped]
    results = []
    for targets in (cropped, dense):
        model = build(TINY)
        torch.manual_seed(1)
        losses = solo_loss(model, model(torch.randn(2, 3, *CANVAS)), targets, config)
        losses["total"].backward()  # type: ignore[no-untyped-call]
        results.append((losses, [parameter.grad for parameter in model.parameters()]))
    (losses, gradients), (others, other_gradients) = results
    assert losses["num_positives"] > 4
    for name, loss in losses.items():
        assert torch.equal(loss, others[name]), name
    for a, b in zip(gradients, other_gradients, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


def federated(targets: list[LevelTargets], *exhaustive: bool) -> list[LevelTargets]:
    return [replace(target, exhaustive=np.array(exhaustive)) for target in targets]


def category_gradients(
    model: Solo, outputs: list[LevelOutput], targets: list[list[LevelTargets]]
) -> tuple[Tensor, ...]:
    """Gradients [B, C, S, S] of the category loss, one per level."""
    loss = solo_loss(model, outputs, targets, LossConfig())["category"]
    return torch.autograd.grad(loss, [output.category_logits for output in outputs])


@BOTH
def test_an_unlabelled_class_has_no_gradient(config: Config) -> None:
    """The first image has no object of class 1 and says nothing of it; the second one does."""
    model = build(config)
    outputs = model(torch.randn(2, 3, *CANVAS))
    targets = [federated(targets_of(config, 6.0), True, False), targets_of(config, 6.0, 12.0)]
    for gradient in category_gradients(model, outputs, targets):
        assert (gradient[0, 1] == 0).all() and (gradient[0, 0] != 0).all()
        assert (gradient[1] != 0).all()


@BOTH
def test_positives_of_a_class_that_is_not_exhaustive_count(config: Config) -> None:
    model = build(config)
    outputs = model(torch.randn(1, 3, *CANVAS))
    targets = federated(targets_of(config, 6.0, 12.0), False, False)
    positives = 0
    for gradient, target in zip(
        category_gradients(model, outputs, [targets]), targets, strict=True
    ):
        expected = F.one_hot(torch.tensor(target.labels), 3)[..., :2].permute(2, 0, 1).bool()
        assert torch.equal(gradient[0] != 0, expected)
        positives += int(expected.sum())
    assert positives >= 4


@BOTH
def test_exhaustive_labels_give_the_loss_of_plain_ones(config: Config) -> None:
    model = build(config)
    outputs = model(torch.randn(2, 3, *CANVAS))
    plain = [targets_of(config, 6.0, 12.0), targets_of(config)]
    known = [federated(plain[0], True, True), plain[1]]
    losses = [solo_loss(model, outputs, t, LossConfig())["total"].item() for t in (plain, known)]
    assert losses[0] == losses[1]
