"""Data that is easily forgotten: trained for a step or two and evaluated, by every kind of head."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.tiny import CLASSES, annotation_of, write_image, write_split
from tests.support.tiny_solo import tiny_config
from training.configs.recipes import apply_recipe
from training.configs.schema import HeadKind
from training.data.coco import CocoDataset
from training.run_options import RunOptions
from training.trainer import Trainer
from training.validation import evaluate_model

SIDE = 64


def masks_of(case: str) -> list[list[np.ndarray[Any, Any]]]:
    """The objects of two images."""
    empty = np.zeros((SIDE, SIDE), np.uint8)
    if case == "no objects":
        return [[], []]
    if case == "one image without":
        return [[np.ones((SIDE, SIDE), np.uint8)], []]
    if case == "one pixel":
        pixel = empty.copy()
        pixel[17, 23] = 1
        return [[pixel], [pixel]]
    many = []
    for index in range(400):  # 3x3 px each, a grid of 20x20
        mask, (row, column) = empty.copy(), divmod(index, 20)
        mask[3 * row : 3 * row + 3, 3 * column : 3 * column + 3] = 1
        many.append(mask)
    return [many, []]


def build(root: Path, case: str) -> CocoDataset:
    annotations, images = [], []
    for image_id, masks in enumerate(masks_of(case), 1):
        canvas = np.full((SIDE, SIDE, 3), 30, np.uint8)
        for mask in masks:
            canvas[mask > 0] = 200
            annotations.append(annotation_of(mask, image_id, CLASSES[0].category_id))
        write_image(root / "images" / f"{image_id}.png", canvas)
        images.append((f"{image_id}.png", SIDE, SIDE))
    write_split(root, "train", images, annotations)
    return CocoDataset(root, "train")


@pytest.mark.parametrize("case", ["no objects", "one image without", "one pixel", "400 objects"])
@pytest.mark.parametrize("kind", ["vanilla", "decoupled"])
@pytest.mark.parametrize("recipe", ["paper", "published"])
def test_training_and_evaluation_get_through(
    case: str, kind: HeadKind, recipe: Any, tmp_path: Path
) -> None:
    data = build(tmp_path, case)
    config = apply_recipe(tiny_config(kind), recipe)
    schedule = replace(config.schedule, batch_size=2, epochs=2, warmup_steps=1)
    config = replace(config, classes=data.classes, schedule=schedule)
    options = RunOptions(out=tmp_path / "run", workers=0, log_every=1)
    trainer = Trainer(config, data, options, None)
    trainer.fit()
    assert trainer.step == 2
    rows = [line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().split()]
    positives = [float(value) for _, name, value in rows[1:] if name == "num_positives"]
    assert all(math.isfinite(float(value)) for _, _, value in rows[1:])
    assert all(p == 0 for p in positives) if case == "no objects" else max(positives) > 0
    numbers = evaluate_model(trainer.averaged_model(), config, data, max_dets=500)
    # Without any object there is no AP to speak of: COCO's -1.
    assert numbers["AP"] == -1 if case == "no objects" else 0 <= numbers["AP"] <= 1


@pytest.mark.parametrize("kind", ["vanilla", "decoupled"])
def test_one_class(kind: HeadKind, tmp_path: Path) -> None:
    data = build(tmp_path, "one pixel")
    config = replace(tiny_config(kind), num_classes=1, classes=CLASSES[:1])
    schedule = replace(config.schedule, batch_size=2, epochs=1, warmup_steps=1)
    trainer = Trainer(
        replace(config, schedule=schedule),
        data,
        RunOptions(out=tmp_path / "run", workers=0),
        None,
    )
    trainer.fit()
    numbers = evaluate_model(trainer.averaged_model(), trainer.config, data, max_dets=100)
    assert trainer.step == 1 and 0 <= numbers["AP"] <= 1
