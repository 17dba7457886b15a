"""The splits of a training run, and the validation between its epochs."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from pipeline.model_config import ContrastSpec
from training import distributed
from training.coco_metrics import mask_ap
from training.configs.schema import Config
from training.data.coco import CocoDataset, open_split
from training.data.records import DatasetError
from training.data.validate import check_classes
from training.model.solo import Solo
from training.predictors import CheckpointPredictor, predict


def evaluate_model(
    model: Solo, config: Config, data: CocoDataset, *, max_dets: int
) -> dict[str, float]:
    """AP of a network on a split; several processes share the images, the first one scores."""
    results = predict(data, CheckpointPredictor(model, config, max_dets=max_dets))
    numbers = {}
    if distributed.is_main():
        numbers = mask_ap(data.truth(), results, max_dets=max_dets)
    return distributed.from_main(numbers)


def load_validation(options: argparse.Namespace) -> CocoDataset:
    """A split for validation during training.

    Raises:
        DatasetError: It has no annotations, as COCO's test-dev.
    """
    data = open_split(options, options.val_split)
    if not data.labelled:
        raise DatasetError(
            f"{data.report.source} has no annotations, so --val-split {options.val_split} is not "
            "possible; train with another split; solo-eval --results writes the file for COCO's "
            "server"
        )
    return data


def open_splits(
    options: argparse.Namespace, contrast: ContrastSpec | None
) -> tuple[CocoDataset, CocoDataset | None]:
    """The data for training and, unless `--val-split` is empty, for validation.

    Their classes are compared, and what cannot be used of them is printed.

    Args:
        options: Of solo-train.
        contrast: Contrast rule of the model's input; validation applies it by itself.

    Raises:
        DatasetError: A split is refused, or the two do not fit together.
    """
    val = load_validation(options) if options.val_split else None
    data = open_split(options, options.train_split).with_contrast(contrast)
    warnings = [*data.report.warnings()]
    if val is not None:
        check_classes(val.checked, data.classes, data.report.source)
        warnings += val.report.warnings()
    distributed.warn("solo-train", warnings)
    return data, val


def build_validator(data: CocoDataset, max_dets: int) -> Callable[[Solo, Config], dict[str, float]]:
    """`evaluate_model` on a split, for the trainer."""

    def validate(model: Solo, config: Config) -> dict[str, float]:
        return evaluate_model(model, config, data, max_dets=max_dets)

    return validate
