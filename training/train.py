"""solo-train: trains a configuration of the model zoo on a COCO-format data set."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from training.configs import get_config, list_configs
from training.configs.schema import Config
from training.data.coco import CocoDataset
from training.evaluate import evaluate_model
from training.model.solo import Solo
from training.overrides import apply_overrides
from training.trainer import RunOptions, Trainer, Validate


def build_parser() -> argparse.ArgumentParser:
    """The command line of solo-train."""
    parser = argparse.ArgumentParser(
        prog="solo-train",
        description="Trains SOLO. Stop it at any time; the same command goes on from the last "
        "checkpoint and ends with the weights an unbroken run would have had.",
        epilog="Example: solo-train nuclei --data datasets/nuclei --set schedule.epochs=24. "
        f"Configurations: {', '.join(list_configs())}.",
    )
    parser.add_argument("config", help="name of a configuration")
    parser.add_argument("--data", type=Path, required=True, help="folder in COCO format")
    parser.add_argument("--train-split", default="train", help="annotation file (train)")
    parser.add_argument("--val-split", default="val", help="annotation file (val); '' for none")
    parser.add_argument("--out", type=Path, help="output folder (default: runs/CONFIG)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change one field, e.g. schedule.lr=0.001 or model.head.num_convs=5; repeatable",
    )
    parser.add_argument("--seed", type=int, default=0, help="makes a run repeatable (0)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--workers", type=int, default=1, help="data loading processes (1)")
    parser.add_argument("--max-dets", type=int, default=500, help="of the validation AP (500)")
    parser.add_argument(
        "--validate-every", type=int, default=5, help="epochs between validations (5)"
    )
    parser.add_argument(
        "--checkpoint-every", type=int, default=200, help="steps between checkpoints (200)"
    )
    parser.add_argument("--max-hours", type=float, help="stop with a checkpoint after this long")
    parser.add_argument("--restart", action="store_true", help="ignore an existing checkpoint")
    return parser


def _validator(options: argparse.Namespace) -> Validate | None:
    if not options.val_split:
        return None
    data = CocoDataset(options.data, options.val_split)

    def validate(model: Solo, config: Config) -> dict[str, float]:
        return evaluate_model(model, config, data, max_dets=options.max_dets)

    return validate


def run(options: argparse.Namespace) -> Path:
    """Trains as the options say; returns the last checkpoint."""
    if options.threads:
        torch.set_num_threads(options.threads)
    config = apply_overrides(get_config(options.config), options.set)
    data = CocoDataset(options.data, options.train_split, config.input.contrast)
    config = replace(config, classes=data.classes, num_classes=len(data.classes))
    run_options = RunOptions(
        out=options.out or Path("runs") / config.name,
        seed=options.seed,
        workers=options.workers,
        device=options.device,
        checkpoint_every=options.checkpoint_every,
        validate_every=options.validate_every,
        max_seconds=options.max_hours * 3600 if options.max_hours else None,
        resume=not options.restart,
    )
    return Trainer(config, data, run_options, _validator(options)).fit()


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        path = run(options)
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"solo-train: {error}", file=sys.stderr)
        return 1
    print(f"checkpoint: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
