"""Short runs of the trainer, and the comparison of what they leave."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.configs.schema import Config
from training.data.coco import CocoDataset
from training.run_options import RunOptions
from training.trainer import Trainer, Validate
from training.weights.formats import load_checkpoint


def longer(config: Config, epochs: int) -> Config:
    return replace(config, schedule=replace(config.schedule, epochs=epochs))


def build(
    config: Config, data: CocoDataset, out: Path, validate: Validate | None = None, **more: Any
) -> Trainer:
    options = {"workers": 0, "log_every": 1, "checkpoint_every": 2, **more}
    return Trainer(config, data, RunOptions(out=out, **options), validate)


def tensors(value: Any, path: str = "") -> dict[str, Tensor]:
    """Every tensor in nested containers by its path."""
    if isinstance(value, Tensor):
        return {path: value}
    if isinstance(value, dict):
        pairs: Any = value.items()
    elif isinstance(value, list | tuple):
        pairs = enumerate(value)
    else:
        return {path: torch.tensor(value)} if isinstance(value, int | float) else {}
    found: dict[str, Tensor] = {}
    for key, item in pairs:
        found |= tensors(item, f"{path}.{key}")
    return found


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, averages, optimizer and counters are equal bit for bit; the clock is not."""
    first, second = load_checkpoint(a)[1], load_checkpoint(b)[1]
    for content in (first, second):
        del content["seconds"]
    one, other = tensors(first), tensors(second)
    assert one.keys() == other.keys() and len(one) > 100
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def column(folder: Path, name: str) -> dict[str, float]:
    """Values of one metric by step."""
    with (folder / "metrics.csv").open(newline="") as file:
        return {row[0]: float(row[2]) for row in csv.reader(file) if row[1] == name}
