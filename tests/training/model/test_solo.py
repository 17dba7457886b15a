from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support.tiny import TINY, TINY_SGD
from training.configs.schema import Config, HeadConfig, NetworkConfig
from training.model.fpn import SingleLevel
from training.model.solo import Solo, points_nms

ONE_LEVEL: dict[str, Any] = {
    "num_grids": (7,),
    "level_strides": (8,),
    "mask_strides": (4,),
    "scale_ranges": ((1, 2048),),
}
SINGLE = replace(
    TINY_SGD,
    model=replace(TINY_SGD.model, neck="single", head=replace(TINY_SGD.model.head, **ONE_LEVEL)),
)


def build(config: Config = TINY, **changes: Any) -> Solo:
    torch.manual_seed(0)
    changes = {"candidate_threshold": 0.0, **changes}
    model = Solo(replace(config.model, **changes), config.num_classes)
    for name, parameter in model.head.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        elif "mask_out" in name:  # the initial bias leaves no pixel above the mask threshold
            torch.nn.init.ones_(parameter)
    return model.eval()


def images(batch: int = 2, height: int = 64, width: int = 96) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    pixels = torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8)
    return pixels, torch.tensor([[height, width]] * batch)


def test_points_nms_keeps_what_no_neighbour_above_or_left_exceeds() -> None:
    probs = torch.tensor([[0.5, 0.6, 0.6], [0.2, 0.1, 0.7], [0.9, 0.3, 0.3]])[None, None]
    kept = (points_nms(probs) > 0)[0, 0]
    for i in range(3):
        for j in range(3):
            window = probs[0, 0, max(i - 1, 0) : i + 1, max(j - 1, 0) : j + 1]
            assert kept[i, j] == (probs[0, 0, i, j] == window.max())


def test_normalisation_and_padding() -> None:
    model = build()
    pixels, valid_hw = images(1, 32, 32)
    valid_hw[0] = torch.tensor([20, 9])
    x = model.normalise(pixels, valid_hw)
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    expected = (pixels[0, 4, 5].float() - mean) / std
    torch.testing.assert_close(x[0, :, 4, 5], expected)
    assert (x[0, :, 20:] == 0).all() and (x[0, :, :, 9:] == 0).all()
    assert (x[0, :, :20, :9] != 0).all()


def brute_force(model: Solo, pixels: Tensor, valid_hw: Tensor) -> list[list[tuple[Any, ...]]]:
    """All cells and classes, one after another: (score, label, mask) sorted."""
    outputs = model(model.normalise(pixels, valid_hw))
    strides = model.config.head.mask_strides
    finest = outputs[strides.index(min(strides))].mask_inputs[0].shape[-2:]
    found = []
    for image in range(len(pixels)):
        rows = []
        for level, output in enumerate(outputs):
            grid = model.config.head.num_grids[level]
            probs = output.category_logits.sigmoid()
            if model.config.recipe == "published":
                probs = points_nms(probs)
            if model.head.decoupled:
                x, y = (m[image].sigmoid() for m in output.mask_inputs)
            else:
                whole = model.head.mask_out[level](output.mask_inputs[0])[image].sigmoid()
            for cell in range(grid * grid):
                i, j = divmod(cell, grid)
                for label in range(model.num_classes):
                    score = probs[image, label, i, j]
                    if model.head.decoupled:
                        u, v = (
                            F.interpolate(m[None, None], size=finest, mode="bilinear")[0, 0]
                            for m in (x[j], y[i])
                        )
                        mask = u * v
                    else:
                        mask = F.interpolate(whole[cell][None, None], size=finest, mode="bilinear")[
                            0, 0
                        ]
                    rows.append((score.item(), label, mask, level))
        rows.sort(key=lambda row: -row[0])
        rows = rows[: model.config.candidates]
        if model.config.recipe == "published":
            weighed = []
            for score, label, mask, level in rows:
                inside = mask > 0.5
                large = inside.sum().item() > model.config.head.level_strides[level]
                mean = mask[inside].mean().item() if large else 0.0
                weighed.append((score * mean, label, mask, level))
            rows = sorted(weighed, key=lambda row: -row[0])
        found.append(rows)
    return found


@pytest.mark.parametrize("config", [TINY, TINY_SGD, SINGLE], ids=["light", "vanilla", "single"])
@pytest.mark.parametrize("recipe", ["paper", "published"])
@torch.inference_mode()
def test_candidates_against_brute_force(config: Config, recipe: str) -> None:
    model = build(config, recipe=recipe)
    pixels, valid_hw = images()
    scores, labels, probs = model.candidates(pixels, valid_hw)
    assert scores.shape == labels.shape == (2, 20) and probs.shape == (2, 20, 16, 24)
    assert scores.dtype == probs.dtype == torch.float32 and labels.dtype == torch.int64
    for image, rows in enumerate(brute_force(model, pixels, valid_hw)):
        assert any(score > 0 for score, *_ in rows)
        for k, (score, label, mask, _) in enumerate(rows):
            assert scores[image, k].item() == pytest.approx(score, abs=1e-6)
            if score > 0:
                assert labels[image, k].item() == label
                torch.testing.assert_close(probs[image, k], mask, rtol=0, atol=1e-5)
        assert (scores[image].diff() <= 0).all()


@torch.inference_mode()
def test_a_candidate_must_exceed_the_threshold() -> None:
    pixels, valid_hw = images()
    scores, _, _ = build(recipe="paper", candidate_threshold=0.0).candidates(pixels, valid_hw)
    threshold = scores[0, 5].item()
    cut, _, _ = build(recipe="paper", candidate_threshold=threshold).candidates(pixels, valid_hw)
    assert (cut[0, :5] > 0).all() and (cut[0, 5:] == 0).all()


@torch.inference_mode()
def test_fewer_cells_than_candidates() -> None:
    model = build(candidates=100_000)
    scores, _, probs = model.candidates(*images(1))
    assert scores.shape[1] == probs.shape[1] == (8 * 8 + 4 * 4) * 2


@torch.inference_mode()
def test_an_image_does_not_depend_on_its_batch() -> None:
    model = build()
    pixels, valid_hw = images()
    both = model.candidates(pixels, valid_hw)
    alone = model.candidates(pixels[1:], valid_hw[1:])
    for a, b in zip(both, alone, strict=True):
        torch.testing.assert_close(a[1:], b, rtol=1e-4, atol=1e-5)


def test_constants_are_no_part_of_the_state_dict() -> None:
    rooms = {key.split(".")[0] for key in build().state_dict()}
    assert rooms == {"backbone", "neck", "head"}


def test_a_model_without_weights_can_be_built_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Solo(NetworkConfig(), 80)
    assert all(p.is_meta for p in model.parameters())


def test_the_single_neck_replaces_the_pyramid() -> None:
    model = build(SINGLE)
    assert isinstance(model.neck, SingleLevel) and model.head.first_stride == 8
    (output,) = model(torch.zeros(1, 3, 64, 96))
    assert output.category_logits.shape == (1, 2, 7, 7)
    assert output.mask_inputs[0].shape[-2:] == (16, 24)


@pytest.mark.parametrize("strides", [(8, 8), (4,), (16,)])
def test_a_single_neck_takes_one_level_of_stride_8(strides: tuple[int, ...]) -> None:
    levels = len(strides)
    head = HeadConfig(
        num_grids=(8,) * levels,
        level_strides=strides,
        mask_strides=(4,) * levels,
        scale_ranges=((1, 2048),) * levels,
    )
    with pytest.raises(ValueError, match=re.escape(f"level_strides is {strides}, the single")):
        NetworkConfig(neck="single", head=head)
