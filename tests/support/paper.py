"""The paper's recipe, its formulas in plain loops (arXiv 1912.04488).

Nothing of the network, the targets or the pipeline is used on the expected side: plain loops,
exact fractions for the centre regions, float64 for the losses.

Symbols: S grid, (i, j) row and column of a cell, H W canvas, h w mask.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.tiny_solo import tiny_config
from training.configs.recipes import apply_recipe
from training.configs.schema import Config, HeadKind
from training.model.head import LevelOutput
from training.model.solo import Solo
from training.targets import Objects, UInt8

CANVAS = (48, 64)
GRIDS = (12, 7)
RANGES = ((1, 24), (12, 2048))
KINDS: list[HeadKind] = ["vanilla", "decoupled", "decoupled_light"]


def paper_config(kind: HeadKind = "vanilla", **loss: Any) -> Config:
    """Two levels; S is no divisor of the canvas on the second."""
    config = apply_recipe(tiny_config(kind), "paper")
    head = replace(config.model.head, num_grids=GRIDS, scale_ranges=RANGES)
    return replace(
        config,
        model=replace(config.model, head=head),
        loss=replace(config.loss, **loss),
        targets=replace(config.targets, mask_resize="bilinear"),
    )


def pixels_of(mask: UInt8) -> list[tuple[int, int]]:
    height, width = mask.shape
    return [(y, x) for y in range(height) for x in range(width) if mask[y, x]]


def objects_of(masks: list[UInt8], labels: list[int]) -> Objects:
    boxes = np.zeros((len(masks), 4), np.float32)
    for row, mask in zip(boxes, masks, strict=True):
        pixels = pixels_of(mask)
        if pixels:
            rows, columns = [y for y, _ in pixels], [x for _, x in pixels]
            row[:] = min(columns), min(rows), max(columns) + 1, max(rows) + 1
    stack = np.stack(masks) if masks else np.zeros((0, *CANVAS), np.uint8)
    return Objects(stack, boxes, np.array(labels, np.int64))


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def cell_probs(model: Solo, output: LevelOutput, level: int, image: int) -> NDArray[np.float64]:
    """Masks of every cell, [S, S, h, w]: S^2 channels, or products of X and Y (section 5)."""
    grid = model.config.head.num_grids[level]
    if model.head.decoupled:
        x, y = (m[image].double().sigmoid().numpy() for m in output.mask_inputs)
        return np.stack([[x[j] * y[i] for j in range(grid)] for i in range(grid)])
    features = output.mask_inputs[0][image].double().numpy()
    conv: Any = model.head.mask_out[level]
    weight, bias = conv.weight[:, :, 0, 0].double().numpy(), conv.bias.double().numpy()
    logits = np.einsum("kc,chw->khw", weight, features) + bias[:, None, None]
    probs: NDArray[np.float64] = 1 / (1 + np.exp(-logits))
    return probs.reshape(grid, grid, *features.shape[1:])
