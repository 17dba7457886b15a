"""What tests/training/test_distributed.py does in one process and again in two."""

from __future__ import annotations

import csv
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.support.tiny import TINY, TINY_SGD
from training import distributed
from training.configs.schema import Config
from training.data.coco import CocoDataset
from training.model.solo import Solo
from training.predictors import CheckpointPredictor, predict
from training.run_options import RunOptions
from training.termination import TERMINATED_STATUS, Terminated
from training.trainer import Trainer
from training.validation import evaluate_model
from training.weights.formats import load_checkpoint


def with_group_norm(config: Config, **schedule: Any) -> Config:
    """SGD and a network without batch statistics: what several processes can do exactly alike."""
    backbone = replace(config.model.backbone, norm="gn")
    return replace(
        config,
        model=replace(config.model, backbone=backbone),
        schedule=replace(
            config.schedule, optimizer="sgd", schedule="step", lr=0.05, warmup_steps=2, **schedule
        ),
    )


# One image a process and one of three images empty: most steps have a process without objects.
TILES = with_group_norm(TINY, batch_size=2, epochs=6, milestones=(4,), frozen_backbone_epochs=1)
CANVASES = with_group_norm(TINY_SGD, batch_size=4, epochs=6, milestones=(4,))
CHECKPOINT_EVERY = 5
RUNS: dict[str, tuple[Config, dict[str, Any]]] = {
    "tiles": (TILES, {}),
    "canvases": (CANVASES, {}),
    "workers": (CANVASES, {"workers": 1}),
}


def train(root: Path, out: Path, config: Config, **options: Any) -> Trainer:
    """Trains to the end; each step's numbers are logged."""
    data = CocoDataset(root, "train")
    run_options = RunOptions(out=out, **{"workers": 0, "log_every": 1, **options})
    trainer = Trainer(config, data, run_options, None)
    trainer.fit()
    return trainer


def train_long(root: Path, out: Path) -> None:
    """24 steps in four epochs of twelve images; a checkpoint at every fifth step."""
    with distributed.joined("cpu"):
        data = CocoDataset(root, "train")
        data.records = data.records * 4
        config = replace(TILES, schedule=replace(TILES.schedule, epochs=4, ema_decay=0.9))
        options = RunOptions(out=out, workers=0, log_every=1, checkpoint_every=CHECKPOINT_EVERY)
        Trainer(config, data, options, None).fit()


def train_stuck(root: Path, out: Path, where: str, stuck: int) -> None:
    """The process `stuck` stays for ten minutes in the third step, or in the validation after it.

    The others wait for it. Each process leaves a file when it comes to that place.
    """

    def stay() -> None:
        (out / f"in_{distributed.rank()}").touch()
        if distributed.rank() == stuck:
            time.sleep(600)

    def validate(model: Solo, config: Config) -> dict[str, float]:
        if where == "validation":
            stay()
        return distributed.from_main({"AP": 0.5})

    with distributed.joined("cpu"):
        config = replace(TILES, schedule=replace(TILES.schedule, epochs=3))
        data = CocoDataset(root, "train")
        trainer = Trainer(config, data, RunOptions(out=out, workers=0), validate)
        assert trainer.total_steps == 3
        weight = trainer.model.head.category_out.weight

        def hook(gradient: torch.Tensor) -> None:
            if where == "step" and trainer.step == 2:
                stay()

        weight.register_hook(hook)  # type: ignore[no-untyped-call]
        try:
            trainer.fit()
        except Terminated as stop:
            print(stop)
            sys.exit(TERMINATED_STATUS)


def curve(folder: Path, name: str) -> list[float]:
    """One number of every step."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row[2]) for row in csv.reader(file) if row[1] == name]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The trained weights of a finished run."""
    state: dict[str, torch.Tensor] = load_checkpoint(folder / "last.pt")[1]["model"]
    return state


def evaluate(root: Path) -> dict[str, Any]:
    """Results and AP of a network with random weights."""
    torch.manual_seed(0)
    model = Solo(TINY.model, TINY.num_classes).eval()
    for name, parameter in model.head.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
        elif "_out" in name:
            torch.nn.init.constant_(parameter, 2.0)  # finds something everywhere
    data = CocoDataset(root, "val")
    results = predict(data, CheckpointPredictor(model, TINY, max_dets=20))
    return {"results": results, "AP": evaluate_model(model, TINY, data, max_dets=20)}


def main(root: Path, out: Path) -> None:
    """Every run and the evaluation, into `out`; each process notes what it sees."""
    noted: dict[str, Any] = {}
    with distributed.joined("cpu"):
        for name, (config, options) in RUNS.items():
            trainer = train(root, out / name, config, **options)
            noted[name] = float(sum(p.detach().double().sum() for p in trainer.model.parameters()))
        try:
            train(root, out / "odd", replace(TILES, schedule=replace(TILES.schedule, batch_size=3)))
        except ValueError as error:
            noted["odd"] = str(error)
        noted["evaluation"] = evaluate(root)
        rank = distributed.rank()
    (out / f"noted{rank}.json").write_text(json.dumps(noted))


if __name__ == "__main__":
    if sys.argv[1] == "stuck":
        train_stuck(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
    else:
        what = {"all": main, "long": train_long}[sys.argv[1]]
        what(Path(sys.argv[2]), Path(sys.argv[3]))
