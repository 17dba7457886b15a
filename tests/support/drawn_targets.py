"""Drawn objects, and their cells and labels by the paper's text."""

from __future__ import annotations

import numpy as np

from tests.support.tiny import disc
from training.configs.schema import HeadConfig, TargetConfig
from training.targets import Objects, UInt8

CANVAS = (96, 128)
HEAD = HeadConfig(
    num_grids=(12, 8, 5),
    level_strides=(8, 16, 32),
    mask_strides=(4, 8, 16),
    scale_ranges=((1, 32), (16, 64), (48, 2048)),
)
PUBLISHED = TargetConfig(recipe="published")
PAPER = TargetConfig(recipe="paper")


def objects_of(masks: list[UInt8], labels: list[int] | None = None) -> Objects:
    boxes = np.zeros((len(masks), 4), np.float32)
    for row, mask in zip(boxes, masks, strict=True):
        rows, columns = np.nonzero(mask)
        if rows.size:
            row[:] = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    stack = np.stack(masks) if masks else np.zeros((0, *CANVAS), np.uint8)
    numbers = np.arange(len(masks)) % 3 if labels is None else np.array(labels)
    return Objects(stack, boxes, numbers.astype(np.int64))


def random_objects(seed: int, count: int) -> Objects:
    rng = np.random.default_rng(seed)
    masks = []
    for _ in range(count):
        mask = disc(*CANVAS, rng.uniform(0, 96), rng.uniform(0, 128), rng.uniform(1, 60))
        mask[: int(rng.integers(0, 96))] = 0
        masks.append(mask)
    return objects_of(masks)


def brute_force(
    objects: Objects, head: HeadConfig, config: TargetConfig
) -> list[tuple[np.ndarray, dict[int, int]]]:
    """Labels and owner of every cell, from the paper's text, cell by cell."""
    results = []
    for grid, (low, high) in zip(head.num_grids, head.scale_ranges, strict=True):
        labels = np.full((grid, grid), 3, np.int64)
        owner: dict[int, int] = {}
        for index, mask in enumerate(objects.masks):
            x1, y1, x2, y2 = objects.boxes_xyxy[index]
            if not mask.any() or not low <= np.sqrt((x2 - x1) * (y2 - y1)) <= high:
                continue
            rows, columns = np.nonzero(mask)
            spans = {0: (rows, y2 - y1), 1: (columns, x2 - x1)}
            covered: list[set[int]] = []
            for axis, (positions, box_span) in spans.items():
                span = (
                    positions.max() + 1 - positions.min() if config.recipe == "paper" else box_span
                )
                size, centre = CANVAS[axis], positions.mean()
                half = 0.5 * 0.2 * span
                inside = set()
                for cell in range(grid):
                    begin, end = cell * size / grid, (cell + 1) * size / grid
                    near = abs(cell - int(centre / size * grid)) <= 1
                    overlaps = centre + half >= begin and centre - half < end
                    if overlaps and (near or config.recipe == "paper"):
                        inside.add(cell)
                covered.append(inside)
            for i in covered[0]:
                for j in covered[1]:
                    labels[i, j] = objects.labels[index]
                    owner[i * grid + j] = index
        results.append((labels, owner))
    return results
