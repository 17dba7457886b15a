"""The command solo-train: trains a configuration of the zoo on a folder of labelled images."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import torch

from training import distributed
from training.configs import list_configs
from training.configs.coco import SCHEDULES, apply_schedule
from training.configs.io import apply_overrides
from training.configs.recipes import Recipe, apply_recipe
from training.configs.rules import default_init
from training.configs.schema import Config
from training.configs.tables import TABLES, Change
from training.configs.toml_files import load_config
from training.configure import configure, name_of, read_configuration, write_configuration
from training.data.coco import CocoDataset, open_split
from training.data.formats import add_format_options
from training.evaluate import build_validator, open_splits
from training.model.solo import Solo
from training.objective import DTYPES
from training.optim import scale_learning_rate
from training.report import Pictures, build_pictures
from training.resume import CHANGEABLE, apply_resume_with
from training.run_folder import BEST_FILE, claimed, export_command
from training.run_options import RunOptions
from training.speed import measure_step
from training.table_command import TABLE_MAX_DETS, run_command
from training.termination import Terminated
from training.trainer import Trainer, Validate
from training.weights.initial import initialise

MAX_WORKERS = 8
TERMINATED_STATUS = 143
"""Exit status after SIGTERM (128 + 15); not 0, because the run is not finished."""


def build_parser() -> argparse.ArgumentParser:
    """The command line of solo-train."""
    parser = argparse.ArgumentParser(
        prog="solo-train",
        description="Trains SOLO. Without CONFIG, the configuration is chosen from the data, and "
        "printed with its reasons and written to config.toml in --out. A run can be stopped at any "
        "time; the same command resumes it from the last checkpoint and gives the same weights as "
        "an uninterrupted run. On SIGTERM it writes a checkpoint within seconds and exits with "
        f"status {TERMINATED_STATUS}; a second one ends it at once. If a loss is not finite, it "
        "goes back to the last good checkpoint with half the learning rate. report.html in the "
        "output folder shows curves and predictions.",
        epilog="Examples: solo-train --data datasets/leaves --hours 2 | "
        "solo-train nuclei --data datasets/nuclei --set schedule.epochs=24 | "
        "torchrun --nproc-per-node 8 -m training.train solo_r50 --data datasets/coco --device cuda "
        f"--init imagenet. Configurations: {', '.join(list_configs())}.",
    )
    what = parser.add_argument_group(
        "what to train: CONFIG, --table, or what is chosen from the data"
    )
    what.add_argument("config", nargs="?", help="name of a configuration, or a TOML file")
    what.add_argument(
        "--table",
        metavar="KEY",
        help="run a table of the paper and print the results beside the paper's numbers: "
        f"{', '.join(TABLES)} (numbers of arXiv 1912.04488v1); runs that are finished in --out are "
        "not repeated, --set and --schedule take precedence over the rows",
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
    parser.add_argument("--data", type=Path, required=True, help="folder of labelled images")
    add_format_options(parser)
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
    parser.add_argument(
        "--workers",
        type=int,
        help="data loading processes (1; with cuda the CPUs of each process, at most "
        f"{MAX_WORKERS})",
    )
    parser.add_argument(
        "--max-dets",
        type=int,
        help="detections per image in the validation AP (default: the configuration's "
        f"postprocess.max_instances, {TABLE_MAX_DETS} for tables)",
    )
    parser.add_argument(
        "--validate-every",
        type=int,
        help="epochs between validations (5; without CONFIG a fifth of the epochs)",
    )
    parser.add_argument(
        "--checkpoint-every", type=int, default=200, help="steps between checkpoints (200)"
    )
    parser.add_argument(
        "--hours",
        type=float,
        help="without CONFIG: the training's time, from which its number of epochs follows (1)",
    )
    parser.add_argument("--max-hours", type=float, help="stop with a checkpoint after this time")
    parser.add_argument(
        "--init",
        metavar="imagenet|FILE|FOLDER",
        help="initial weights of a new run: ImageNet's for the backbone (a ResNet's are downloaded "
        "once), a file of them, or a model to fine-tune: a checkpoint, or a folder in "
        "model_repo whose latest version has weights.pt, with the same classes or others; not read "
        "when a run is resumed",
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


def _initialiser(init: str, config: Config) -> Callable[[Solo], None]:
    def fill(model: Solo) -> None:
        for line in initialise(model, init, config.classes):
            if distributed.is_main():
                print(f"solo-train: {line}")

    return fill


def build_config(
    name: str, options: argparse.Namespace, change: Change = lambda config: config
) -> Config:
    """The named configuration with the change of a table's row, then those of the options."""
    return change_config(change(load_config(name)), options)


def change_config(config: Config, options: argparse.Namespace) -> Config:
    """`config` with the changes of the options."""
    reference_batch = config.schedule.batch_size
    if options.recipe:
        config = apply_recipe(config, options.recipe)
    if options.schedule:
        config = apply_schedule(config, options.schedule)
    config = apply_overrides(config, options.set)
    return scale_learning_rate(config, reference_batch) if options.scale_lr else config


def _require_run(options: argparse.Namespace, out: Path) -> None:
    """Checks that --resume-with has a run to resume."""
    if options.restart:
        raise ValueError("--resume-with is not possible with --restart")
    if not (out / "last.pt").exists():
        raise ValueError(f"--resume-with: there is no run to resume, {out / 'last.pt'} is missing")


def run(options: argparse.Namespace) -> Path:
    """Trains as the options say; returns the last checkpoint, or the file of a table."""
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.config is not None and options.table is not None:
        raise ValueError("give either a configuration or --table KEY")
    if options.table is None and options.config is None:
        return _run_configured(options)
    if options.hours is not None:
        raise ValueError("--hours is for runs without a configuration; --max-hours is a time limit")
    if options.table:
        if options.resume_with:
            raise ValueError("--resume-with is not possible with --table")
        return run_command(options, build_config, _train)
    config = build_config(options.config, options)
    out = options.out or Path("runs") / config.name
    with claimed(out):
        return _train_validated(config, options, out)


def _train_validated(
    config: Config, options: argparse.Namespace, out: Path, train: CocoDataset | None = None
) -> Path:
    """Trains on the data of the options, and validates on the other split unless it is empty."""
    data, val = open_splits(options, config.input.contrast, train)
    config = replace(config, classes=data.classes, num_classes=len(data.classes))
    if options.resume_with:
        _require_run(options, out)
        config = apply_resume_with(config, options.resume_with)
    validate, pictures = None, None
    if val is not None:
        validate = build_validator(val, options.max_dets or config.postprocess.max_instances)
        pictures = build_pictures(val)
    trainer = _train(config, data, options, out, options.seed, validate, pictures=pictures)
    if val is not None and distributed.is_main() and (out / BEST_FILE).exists():
        print(
            f"solo-train: AP {trainer.best:.3f} on {len(val)} images that were not trained on: "
            f"{out / BEST_FILE}\nto publish it: {export_command(options, out)}"
        )
    return out / "last.pt"


def _run_configured(options: argparse.Namespace) -> Path:
    """Trains a configuration that follows from the data; a later start reads what it wrote."""
    if options.scale_lr or options.schedule:
        raise ValueError("--scale-lr and --schedule change a configuration; name one")
    name = name_of(options.data)
    out = options.out or Path("runs") / name
    with claimed(out):
        return _configure_and_train(name, options, out)


def _configure_and_train(name: str, options: argparse.Namespace, out: Path) -> Path:
    config, data = None if options.restart else read_configuration(out), None
    if config is None:
        data = open_split(options, options.train_split)
        plan = configure(
            name,
            data,
            device=options.device,
            hours=1.0 if options.hours is None else options.hours,
            init=options.init,
            change=lambda config: change_config(config, options),
            measure_step=partial(_measure_step, data, options),
        )
        config = plan.config
        if distributed.is_main():
            path = write_configuration(plan, out)
            print("\n".join((f"solo-train: chosen for {options.data}, in {path}:", *plan.reasons)))
    config = change_config(config, options)
    options.init = options.init or default_init(config)
    if options.validate_every is None:
        options.validate_every = -(-config.schedule.epochs // 5)
    return _train_validated(config, options, out, data)


def _measure_step(data: CocoDataset, options: argparse.Namespace, config: Config) -> float:
    """Time of a training step in this process, s; trains a model that is thrown away."""
    data = data.with_contrast(config.input.contrast)
    schedule = replace(config.schedule, frozen_backbone_epochs=0)  # those steps are faster
    config = replace(config, schedule=schedule)
    with tempfile.TemporaryDirectory() as folder:
        run_options = _run_options(options, Path(folder), options.seed, init=None)
        trainer = Trainer(config, data, replace(run_options, resume=False), None)
        return measure_step(trainer)


def _train(
    config: Config,
    data: CocoDataset,
    options: argparse.Namespace,
    out: Path,
    seed: int,
    validate: Validate | None,
    *,
    label: str = "",
    pictures: Pictures | None = None,
) -> Trainer:
    """Trains into a folder that is claimed."""
    init = _initialiser(options.init, config) if options.init else None
    run_options = replace(_run_options(options, out, seed, init), label=label)
    trainer = Trainer(config, data, run_options, validate, pictures)
    if not options.init and trainer.step == 0:
        _refuse_frozen(config)
    trainer.fit()
    return trainer


def _run_options(
    options: argparse.Namespace, out: Path, seed: int, init: Callable[[Solo], None] | None
) -> RunOptions:
    return RunOptions(
        out=out,
        seed=seed,
        workers=choose_workers(options),
        device=options.device,
        checkpoint_every=options.checkpoint_every,
        validate_every=5 if options.validate_every is None else options.validate_every,
        max_seconds=options.max_hours * 3600 if options.max_hours else None,
        resume=not options.restart,
        precision=options.precision,
        accumulate=options.accumulate,
        channels_last=options.channels_last,
        compile=options.compile,
        init=init,
    )


def _refuse_frozen(config: Config) -> None:
    backbone = config.model.backbone
    frozen = [f"{backbone.frozen_stages} frozen stages"] if backbone.frozen_stages else []
    frozen += ["frozen batch norm"] if backbone.norm == "frozen_bn" else []
    epochs = config.schedule.frozen_backbone_epochs
    frozen += [f"{epochs} frozen epochs"] if epochs else []
    if frozen:
        raise ValueError(
            f"the backbone has {' and '.join(frozen)}, but its weights would be random: give "
            "trained ones (--init imagenet, as the paper), or train all of it with "
            "--set model.backbone.norm=gn --set model.backbone.frozen_stages=0 "
            "--set schedule.frozen_backbone_epochs=0"
        )


def choose_workers(options: argparse.Namespace) -> int:
    """The given number of data loading processes, or one that fits the machine."""
    if options.workers is not None:
        return int(options.workers)
    if not options.device.startswith("cuda"):
        return 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MAX_WORKERS, len(os.sched_getaffinity(0)) // processes))


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
