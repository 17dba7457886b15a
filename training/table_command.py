"""`solo-train --table`: what the options of the command line mean for the rows of a table."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from training import distributed
from training.configs import get_config
from training.configs.schema import Config
from training.configs.tables import Change, get_table, refuse_overrides
from training.data.coco import CocoDataset
from training.data.digest import data_digest
from training.model.solo import Solo
from training.predictors import CheckpointPredictor
from training.run_folder import claimed, require_writable
from training.speed import MAX_IMAGES, device_name, measure_fps
from training.tables import RunResult, TablePlan, run_table
from training.trainer import Trainer, Validate
from training.validation import build_validator, open_splits
from training.weights.initial import hash_initial

TABLE_MAX_DETS = 100  # the paper's, and COCO's


BuildConfig = Callable[[str, argparse.Namespace, Change], Config]
"""The named configuration with the change of a row, then those of the options."""
Train = Callable[..., Trainer]
"""Called with config, data, options, folder, seed, validate and `label=`; returns the trainer."""


def run_command(options: argparse.Namespace, build_config: BuildConfig, train: Train) -> Path:
    """Runs a table and prints it; returns its file.

    Raises:
        ValueError: An option does not fit the table, or there is no validation split.
        OSError: The output folder cannot be written; before the data is read.
    """
    table = get_table(options.table)
    base = get_config(options.base or table.base)
    refuse_overrides(table, base, options.set)
    if not options.val_split:
        raise ValueError("a table needs a validation split, --val-split is empty")
    out = options.out or Path("runs/tables")
    require_writable(out)
    contrast = build_config(base.name, options, table.rows[0].change).input.contrast
    data, val = open_splits(options, contrast)
    assert val is not None  # --val-split is not empty
    max_dets = options.max_dets or TABLE_MAX_DETS

    def configure(change: Change) -> Config:
        config = build_config(base.name, options, change)
        return replace(config, classes=data.classes, num_classes=len(data.classes))

    def train_row(config: Config, folder: Path, seed: int, label: str) -> RunResult:
        if distributed.is_main():
            print(f"solo-train: {label}: {folder}", flush=True)
        validate = LastMetrics(build_validator(val, max_dets))
        with claimed(folder):
            trainer = train(config, data, options, folder, seed, validate, label=label)
        if trainer.step < trainer.total_steps:
            raise ValueError(
                f"{folder} is at step {trainer.step} of {trainer.total_steps}; "
                "the same command resumes it"
            )
        model = trainer.averaged_model()
        metrics = validate.metrics or validate(model, config)
        return RunResult(
            metrics, _measure(model, config, val, max_dets), device_name(options.device)
        )

    plan = TablePlan(
        configure=configure,
        training={
            "data": data_digest(data),
            "init": hash_initial(options.init),
            "precision": options.precision,
            "accumulate": options.accumulate,
            "compile": options.compile,
            "channels_last": options.channels_last,
        },
        evaluation={"data": data_digest(val), "split": options.val_split, "max_dets": max_dets},
        train=train_row,
        restart=options.restart,
    )
    text = run_table(table, plan, out, rows=options.row, seeds=options.seeds)
    if distributed.is_main():
        print(text)
    return Path(out / f"table_{table.key}.md")


class LastMetrics:
    """Keeps the metrics of the last validation, which is that of the last weights of a run.

    A table has these, as the paper does, and not those of the best epoch.
    """

    def __init__(self, validate: Validate) -> None:
        self._validate = validate
        self.metrics: dict[str, float] = {}

    def __call__(self, model: Solo, config: Config) -> dict[str, float]:
        """The metrics of a model."""
        self.metrics = self._validate(model, config)
        return self.metrics


def _measure(model: Solo, config: Config, val: CocoDataset, max_dets: int) -> float:
    fps = 0.0
    if distributed.is_main() and len(val):
        images = [val.image_bytes(index) for index in range(min(len(val), MAX_IMAGES + 1))]
        fps = measure_fps(CheckpointPredictor(model, config, max_dets=max_dets), images)
    return distributed.from_main(fps)
