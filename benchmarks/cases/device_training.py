"""solo-train's loop on the bundled model's network for some minutes: images a second, losses.

The last checkpoint stays in --run. NOT RUN ON HARDWARE. `--quick` trains a tiny network.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch

from benchmarks.harness import BenchmarkError
from benchmarks.harness.report import Report, Row
from service.cores import count_cores
from tests.support.tiny import TINY
from training.configs import get_config
from training.data.coco import CocoDataset
from training.objective import Precision
from training.options import MAX_WORKERS
from training.run_options import RunOptions
from training.trainer import Trainer


def device_training(
    *,
    data: Annotated[Path, "folder of labelled images"],
    run: Annotated[Path, "folder for the run"],
    split: Annotated[str, "of the data"] = "train",
    device: Annotated[str, "where"] = "cuda",
    precision: Annotated[Precision, "of the convolutions"] = "bf16",
    quick: Annotated[bool, "a tiny network"] = False,
    seconds: Annotated[float, "of training"] = 120,
) -> Report:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BenchmarkError(f"torch {torch.__version__} finds no CUDA device")
    dataset = CocoDataset(data, split)
    config = TINY if quick else get_config("nuclei")
    config = replace(config, classes=dataset.classes, num_classes=len(dataset.classes))
    options = RunOptions(
        out=run,
        device=device,
        precision=precision,
        channels_last=True,
        workers=0 if quick else min(MAX_WORKERS, count_cores()),
        max_seconds=seconds,
        resume=False,
        log_every=1 if quick else 10,
    )
    trainer = Trainer(config, dataset, options, None)
    checkpoint = trainer.fit()
    losses = read_losses(run / "metrics.csv")
    row: Row = {
        "steps": trainer.step,
        "images_per_s": round(trainer.step * config.schedule.batch_size / trainer.seconds, 2),
        "seconds": round(trainer.seconds, 1),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "checkpoint_mb": round(checkpoint.stat().st_size / 1e6, 1),
    }
    return Report(
        data={"config": config.name, "precision": precision, **row},
        tables={"": [row]},
        packages=("torch",),
    )


def read_losses(metrics: Path) -> list[float]:
    """The total losses that a run logged.

    Raises:
        BenchmarkError: There are none.
    """
    with metrics.open(newline="") as file:
        losses = [float(row["value"]) for row in csv.DictReader(file) if row["name"] == "total"]
    if not losses:
        raise BenchmarkError(f"{metrics} has no losses")
    return losses
