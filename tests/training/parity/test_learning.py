"""Targets, losses and gradients against the published implementation's numbers."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.parity import (
    ParityModel,
    each,
    load_input,
    load_metas,
    load_objects,
    load_parity_model,
    parity_models,
    read_npz,
)
from training.configs.schema import LossConfig, TargetConfig
from training.criterion import solo_loss
from training.model.solo import Solo
from training.targets import LevelTargets, assign_targets
from training.weights.convert import convert_key

SCENES = [(which, scene) for which in parity_models() for scene in which.scenes()]
EVERY_SCENE = each("which,scene", SCENES)
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


def case_of(which: ParityModel, scene: str) -> str:
    """The stored input with as many images as the scene, of the masks' size."""
    sizes = [o.masks.shape[1:] for o in load_objects(which, scene)]
    for case in which.cases():
        shapes = [tuple(meta["img_shape"]) for meta in load_metas(which, case)]
        if shapes == sizes:
            return case
    raise AssertionError(f"no input has images of {sizes}")


def targets_of(which: ParityModel, scene: str) -> list[list[LevelTargets]]:
    model = load_parity_model(which)
    canvas = load_input(which, case_of(which, scene)).shape[-2:]
    return [
        assign_targets(
            objects,
            (canvas[0], canvas[1]),
            model.config.head,
            TargetConfig(recipe="published"),
            model.num_classes,
        )
        for objects in load_objects(which, scene)
    ]


@EVERY_SCENE
def test_targets(which: ParityModel, scene: str) -> None:
    stored = read_npz(which.folder / f"loss_{scene}.npz")
    for image, levels in enumerate(targets_of(which, scene)):
        for level, target in enumerate(levels):
            np.testing.assert_array_equal(target.labels, stored[f"img{image}_labels{level}"])
            if f"img{image}_pos_mask{level}" in stored:
                cells = np.flatnonzero(stored[f"img{image}_pos_mask{level}"])
            else:
                rows, columns = stored[f"img{image}_yx_pos{level}"].T
                cells = rows * target.labels.shape[1] + columns
            np.testing.assert_array_equal(target.cells, cells)
            np.testing.assert_array_equal(
                np.asarray(target.masks)[target.mask_index],
                stored[f"img{image}_mask_target{level}"],
            )
    count = sum(len(t.cells) for levels in targets_of(which, scene) for t in levels)
    assert count == stored["num_pos"]


def trained(which: ParityModel, scene: str, dtype: torch.dtype) -> tuple[Solo, dict[str, Tensor]]:
    """A model in training mode after the backward pass of a scene, and its losses."""
    model = deepcopy(load_parity_model(which)).to(dtype).train()
    outputs = model(load_input(which, case_of(which, scene)).to(dtype))
    losses = solo_loss(model, outputs, targets_of(which, scene), LossConfig())
    losses["total"].backward()  # type: ignore[no-untyped-call]
    return model, losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@EVERY_SCENE
def test_losses(which: ParityModel, scene: str, dtype: torch.dtype) -> None:
    stored = read_npz(which.folder / f"loss_{scene}.npz")
    _, losses = trained(which, scene, dtype)
    assert losses["num_positives"] == stored["num_pos"]
    for name, key in (("category", "loss_cls"), ("mask", "loss_mask")):
        found = losses[name].item()
        assert found == pytest.approx(float(stored[key]), rel=LOSS_TOLERANCE, abs=1e-9)


@EVERY_SCENE
def test_gradients(which: ParityModel, scene: str) -> None:
    """In float64: in float32 a ReLU whose input is nearly 0 may have either derivative.

    Which one depends on the CPU's instruction set; one such input changes gradients by up to 2%.
    """
    stored = read_npz(which.folder / f"loss_{scene}.npz")
    model, _ = trained(which, scene, torch.float64)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    compared = set()
    for key, norm in zip(stored["grad_names"], stored["grad_norms"], strict=True):
        name = convert_key(str(key))
        compared.add(name)
        gradient = gradients[name]
        found = -1.0 if gradient is None else gradient.norm().item()
        assert found == pytest.approx(float(norm), rel=GRADIENT_TOLERANCE, abs=1e-7), key
    assert compared == set(gradients)
    whole = [key for key in stored if key.startswith("grad/")]
    assert whole
    for key in whole:
        gradient = gradients[convert_key(key.removeprefix("grad/"))]
        assert gradient is not None
        scale = float(np.abs(stored[key]).max())
        difference = np.abs(gradient.numpy() - stored[key]).max()
        assert difference <= GRADIENT_TOLERANCE * scale, key


@each("which", [(which,) for which in parity_models()])
def test_frozen_parts_get_no_gradient(which: ParityModel) -> None:
    model = deepcopy(load_parity_model(which)).train()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    prefixes = ("backbone.conv1.", "backbone.bn1.", "backbone.layer1.")
    assert all(name.startswith(prefixes) for name in frozen)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)
