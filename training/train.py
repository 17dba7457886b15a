"""The command solo-train: trains a configuration of the zoo on a COCO-format data set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from training import distributed
from training.configs import get_config, list_configs
from training.configs.coco import SCHEDULES, apply_schedule
from training.configs.io import apply_overrides
from training.configs.recipes import Recipe, apply_recipe
from training.configs.schema import Config
from training.configs.tables import TABLES, get_table
from training.data.coco import CocoDataset
from training.evaluate import evaluate_model
from training.model.solo import Solo
from training.objective import DTYPES
from training.optim import scale_learning_rate
from training.report import Pictures, build_pictures
from training.resume import CHANGEABLE, apply_resume_with
from training.run_folder import claimed
from training.run_options import RunOptions
from training.tables import run_table
from training.termination import Terminated
from training.trainer import Trainer, Validate
from training.weights.importing import initialise

TERMINATED_STATUS = 143
"""Exit status after SIGTERM (128 + 15); not 0, because the run is not finished."""


def build_parser() -> argparse.ArgumentParser:
    """The command line of solo-train."""
    parser = argparse.ArgumentParser(
        prog="solo-train",
        description="Trains SOLO. A run can be stopped at any time; the same command resumes it "
        "from the last checkpoint and gives the same weights as an uninterrupted run. On SIGTERM "
        f"it writes a checkpoint within seconds and exits with status {TERMINATED_STATUS}; a "
        "second one ends it at once. If a loss is not finite, it goes back to the last good "
        "checkpoint with half the learning rate. report.html in the output folder shows curves "
        "and predictions.",
        epilog="Examples: solo-train nuclei --data datasets/nuclei --set schedule.epochs=24 | "
        "torchrun --nproc-per-node 8 -m training.train solo_r50 --data datasets/coco --device cuda "
        f"--init imagenet. Configurations: {', '.join(list_configs())}.",
    )
    what = parser.add_argument_group("what to train: CONFIG or --table")
    what.add_argument("config", nargs="?", help="name of a configuration")
    what.add_argument(
        "--table",
        metavar="KEY",
        help="run a table of the paper and print the results beside the paper's numbers: "
        f"{', '.join(TABLES)}; runs that are finished in --out are not repeated",
    )
    what.add_argument("--base", help="base configuration of the table's rows (solo_r50)")
    what.add_argument(
        "--row", action="append", default=[], help="run only this row of the table; repeatable"
    )
    what.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        help="seeds with which every row of the table is run (0)",
    )
    parser.add_argument(
        "--recipe",
        choices=get_args(Recipe),
        help="targets, losses and inference as in the paper or as in the published code",
    )
    parser.add_argument(
        "--schedule",
        choices=list(SCHEDULES),
        help="epochs and milestones of the paper's schedules: "
        + ", ".join(f"{name} {s.epochs} epochs" for name, s in SCHEDULES.items()),
    )
    parser.add_argument("--data", type=Path, required=True, help="folder in COCO format")
    parser.add_argument("--train-split", default="train", help="annotation file (train)")
    parser.add_argument(
        "--val-split", default="val", help="annotation file (val); '': no validation"
    )
    parser.add_argument("--out", type=Path, help="output folder (default: runs/CONFIG)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change one field, e.g. schedule.lr=0.001 or model.head.num_convs=5; repeatable",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (0)")
    parser.add_argument(
        "--device",
        default="cpu",
        help="cpu, cuda, cuda:1, ... (cpu); with torchrun, cuda is the GPU of each process",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--workers", type=int, default=1, help="data loading processes (1)")
    parser.add_argument(
        "--max-dets", type=int, default=500, help="detections per image in the validation AP (500)"
    )
    parser.add_argument(
        "--validate-every", type=int, default=5, help="epochs between validations (5)"
    )
    parser.add_argument(
        "--checkpoint-every", type=int, default=200, help="steps between checkpoints (200)"
    )
    parser.add_argument("--max-hours", type=float, help="stop with a checkpoint after this time")
    parser.add_argument(
        "--init",
        metavar="imagenet|FILE|FOLDER",
        help="initial weights of a new run: ImageNet's for the backbone (downloaded once), a "
        "ResNet file of torchvision, or a model to fine-tune: a checkpoint, or a folder in "
        "model_repo whose latest version has weights.pt; not read when a run is resumed",
    )
    parser.add_argument("--restart", action="store_true", help="ignore an existing checkpoint")
    parser.add_argument(
        "--resume-with",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a field of the run that is resumed, e.g. schedule.epochs=48 or "
        f"schedule.lr=0.001; repeatable; possible for {', '.join(CHANGEABLE)}",
    )
    _add_speed_options(parser.add_argument_group("speed and memory"))
    return parser


def _add_speed_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--precision",
        choices=list(DTYPES),
        default="fp32",
        help="precision of the convolutions; weights, masks and losses are always fp32 (fp32)",
    )
    group.add_argument(
        "--accumulate",
        type=int,
        metavar="N",
        help="split the images of a process into N forward passes, which needs less memory and "
        "gives the same gradients, except with plain batch norm (default: 1 for tiles, else one "
        "for every schedule.images_per_canvas images)",
    )
    group.add_argument(
        "--channels-last", action="store_true", help="use the channels-last memory layout"
    )
    group.add_argument(
        "--compile", action="store_true", help="compile the network with torch.compile"
    )
    group.add_argument(
        "--scale-lr",
        action="store_true",
        help="multiply schedule.lr by batch size / batch size of the configuration",
    )


def _validator(options: argparse.Namespace) -> tuple[Validate, Pictures] | None:
    if not options.val_split:
        return None
    data = CocoDataset(options.data, options.val_split)

    def validate(model: Solo, config: Config) -> dict[str, float]:
        return evaluate_model(model, config, data, max_dets=options.max_dets)

    return validate, build_pictures(data)


def _initialiser(init: str) -> Callable[[Solo], None]:
    def fill(model: Solo) -> None:
        for line in initialise(model, init):
            if distributed.is_main():
                print(f"solo-train: {line}")

    return fill


def build_config(name: str, options: argparse.Namespace) -> Config:
    """The named configuration with the changes of the options."""
    config = get_config(name)
    reference_batch = config.schedule.batch_size
    if options.recipe:
        config = apply_recipe(config, options.recipe)
    if options.schedule:
        config = apply_schedule(config, options.schedule)
    config = apply_overrides(config, options.set)
    return scale_learning_rate(config, reference_batch) if options.scale_lr else config


def _require_run(options: argparse.Namespace, out: Path) -> None:
    """Checks that --resume-with has a run to resume."""
    for given, name in ((options.table, "--table"), (options.restart, "--restart")):
        if given:
            raise ValueError(f"--resume-with is not possible with {name}")
    if not (out / "last.pt").exists():
        raise ValueError(f"--resume-with: there is no run to resume, {out / 'last.pt'} is missing")


def run(options: argparse.Namespace) -> Path:
    """Trains as the options say; returns the last checkpoint, or the file of a table."""
    if options.threads:
        torch.set_num_threads(options.threads)
    if (options.config is None) == (options.table is None):
        raise ValueError("give either a configuration or --table KEY")
    table = get_table(options.table) if options.table else None
    config = build_config((options.base or table.base) if table else options.config, options)
    data = CocoDataset(options.data, options.train_split, config.input.contrast)
    config = replace(config, classes=data.classes, num_classes=len(data.classes))
    out = options.out or Path("runs") / ("tables" if table else config.name)
    if options.resume_with:
        _require_run(options, out)
        config = apply_resume_with(config, options.resume_with)
    if table is None:
        _train(config, data, options, out, options.seed)
        return out / "last.pt"

    def train_one(config: Config, folder: Path, seed: int) -> dict[str, float]:
        validation = _validator(options)
        if validation is None:
            raise ValueError("a table needs a validation split, --val-split is empty")
        trainer = _train(config, data, options, folder, seed, validate_at_end=False)
        if trainer.step < trainer.total_steps:
            raise ValueError(
                f"{folder} is at step {trainer.step} of {trainer.total_steps}; "
                "the same command resumes it"
            )
        return validation[0](trainer.averaged_model(), config)

    text = run_table(table, config, out, rows=options.row, seeds=options.seeds, train_one=train_one)
    if distributed.is_main():
        print(text)
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
        precision=options.precision,
        accumulate=options.accumulate,
        channels_last=options.channels_last,
        compile=options.compile,
        init=_initialiser(options.init) if options.init else None,
    )
    validation = _validator(options) if validate_at_end else None
    validate, pictures = validation or (None, None)
    with claimed(out):
        trainer = Trainer(config, data, run_options, validate, pictures)
        frozen = config.model.backbone.norm == "frozen_bn"
        if frozen and not options.init and trainer.step == 0 and distributed.is_main():
            print(
                "solo-train: the backbone is partly frozen and has random weights; the paper "
                "starts from ImageNet weights, --init imagenet",
                file=sys.stderr,
            )
        trainer.fit()
    return trainer


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        with distributed.joined(options.device) as device:
            options.device = device
            path = run(options)
            main_process = distributed.is_main()
    except Terminated as stop:
        return _fail(f"{stop}; the same command resumes it", TERMINATED_STATUS)
    except (ValueError, FloatingPointError, OSError) as error:
        return _fail(_without_traceback(str(error)))
    except RuntimeError as error:
        if not distributed.is_lost_peer(error):
            raise
        return _fail(f"another process has failed ({error})")
    if main_process:
        print(f"checkpoint: {path}" if path.suffix == ".pt" else f"table: {path}")
    return 0


def _without_traceback(message: str) -> str:
    """The last line of the traceback that an error of a data loading process contains."""
    if "Original Traceback" not in message:
        return message
    return message.strip().splitlines()[-1].partition(": ")[2]


def _fail(message: str, status: int = 1) -> int:
    """Prints an error in one line, with the number of the process if there are several."""
    process = f" process {distributed.rank()}:" if distributed.world_size() > 1 else ""
    print(f"solo-train:{process} {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
