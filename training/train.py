"""solo-train: trains a configuration of the model zoo on a COCO-format data set."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from training.configs import get_config, list_configs
from training.configs.recipes import Recipe, apply_recipe
from training.configs.schema import Config
from training.configs.tables import TABLES, get_table
from training.data.coco import CocoDataset
from training.evaluate import evaluate_model
from training.model.solo import Solo
from training.overrides import apply_overrides
from training.tables import run_table
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
    what = parser.add_argument_group("what to train: CONFIG or --table")
    what.add_argument("config", nargs="?", help="name of a configuration")
    what.add_argument(
        "--table",
        metavar="KEY",
        help="run a table of the paper and print it beside the paper's numbers: "
        f"{', '.join(TABLES)}; what is finished in --out is not repeated",
    )
    what.add_argument("--base", help="configuration that the table's rows change (solo_r50)")
    what.add_argument(
        "--row", action="append", default=[], help="only this row of the table; repeatable"
    )
    what.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="runs of every row of the table (0)"
    )
    parser.add_argument(
        "--recipe",
        choices=get_args(Recipe),
        help="targets, losses and inference as the paper says or as the published code does",
    )
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
    """Trains as the options say; returns the last checkpoint, or a table's file."""
    if options.threads:
        torch.set_num_threads(options.threads)
    if (options.config is None) == (options.table is None):
        raise ValueError("give either a configuration or --table KEY")
    table = get_table(options.table) if options.table else None
    config = get_config((options.base or table.base) if table else options.config)
    if options.recipe:
        config = apply_recipe(config, options.recipe)
    config = apply_overrides(config, options.set)
    data = CocoDataset(options.data, options.train_split, config.input.contrast)
    config = replace(config, classes=data.classes, num_classes=len(data.classes))
    out = options.out or Path("runs") / ("tables" if table else config.name)
    if table is None:
        return _train(config, data, options, out, options.seed).save()

    def train_one(config: Config, folder: Path, seed: int) -> dict[str, float]:
        validate = _validator(options)
        if validate is None:
            raise ValueError("a table needs a validation split, --val-split is empty")
        trainer = _train(config, data, options, folder, seed, validate_at_end=False)
        if trainer.step < trainer.total_steps:
            raise ValueError(
                f"{folder} is at step {trainer.step} of {trainer.total_steps}; "
                "the same command goes on"
            )
        return validate(trainer.averaged_model(), config)

    print(run_table(table, config, out, rows=options.row, seeds=options.seeds, train_one=train_one))
    return out / f"table_{table.key}.md"


def _train(
    config: Config,
    data: CocoDataset,
    options: argparse.Namespace,
    out: Path,
    seed: int,
    *,
    validate_at_end: bool = True,
) -> Trainer:
    run_options = RunOptions(
        out=out,
        seed=seed,
        workers=options.workers,
        device=options.device,
        checkpoint_every=options.checkpoint_every,
        validate_every=options.validate_every,
        max_seconds=options.max_hours * 3600 if options.max_hours else None,
        resume=not options.restart,
    )
    trainer = Trainer(config, data, run_options, _validator(options) if validate_at_end else None)
    trainer.fit()
    return trainer


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        path = run(options)
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"solo-train: {error}", file=sys.stderr)
        return 1
    print(f"checkpoint: {path}" if path.suffix == ".pt" else f"table: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
