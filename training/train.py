"""The command solo-train: trains a configuration of the zoo on a folder of labelled images."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from training import distributed
from training.configs.coco import apply_schedule
from training.configs.io import apply_overrides
from training.configs.recipes import apply_recipe
from training.configs.rules import default_init
from training.configs.schema import Config
from training.configs.tables import Change
from training.configs.toml_files import load_config
from training.configure import configure, name_of, read_configuration, write_configuration
from training.data.coco import CocoDataset
from training.data.validation import describe_validation, doubt_validation
from training.model.solo import Solo
from training.optim import scale_learning_rate
from training.options import build_parser, choose_workers
from training.precision import Numerics, settle_precision
from training.provenance import describe_command, describe_training
from training.report import Pictures, build_pictures
from training.resume import apply_resume_with
from training.run_folder import BEST_FILE, claimed, export_command
from training.run_options import RunOptions
from training.speed import measure_step
from training.table_command import run_command
from training.termination import TERMINATED_STATUS, Terminated
from training.trainer import Trainer, Validate
from training.validation import build_validator, open_splits
from training.weights.initial import initialise

Splits = tuple[CocoDataset, CocoDataset | None]
"""The data for training and for validation."""


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
    if not options.val_split and options.val_fraction is None:
        options.val_fraction = 0.0
    if options.config is not None and options.table is not None:
        raise ValueError("give either a configuration or --table KEY")
    if options.table is None and options.config is None:
        return _run_configured(options)
    if options.hours is not None:
        raise ValueError("--hours is for runs without a configuration; --max-hours is a time limit")
    options.precision = options.precision or "fp32"
    if options.table:
        if options.precision == "auto":
            raise ValueError("--precision auto is not possible with --table, whose rows are alike")
        if options.resume_with:
            raise ValueError("--resume-with is not possible with --table")
        return run_command(options, build_config, _train)
    config = build_config(options.config, options)
    out = options.out or Path("runs") / config.name
    with claimed(out):
        return _train_validated(config, options, out)


def _train_validated(
    config: Config, options: argparse.Namespace, out: Path, splits: Splits | None = None
) -> Path:
    """Trains on the data of the options, and validates on the other split unless it is empty."""
    if splits is None:
        splits = open_splits(options, config.input.contrast)
        if splits[1] is not None and (doubt := doubt_validation(splits[1])):
            distributed.warn("solo-train", [doubt])
    data, val = splits[0].with_contrast(config.input.contrast), splits[1]
    config = replace(config, classes=data.classes, num_classes=len(data.classes))
    if options.resume_with:
        _require_run(options, out)
        config = apply_resume_with(config, options.resume_with)
    if options.precision == "auto":
        _, reason = settle_precision(options, out, partial(_measure_step, data, options, config))
        if distributed.is_main():
            print(f"solo-train: {reason}", flush=True)
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
    options.precision = options.precision or "auto"
    name = name_of(options.data)
    out = options.out or Path("runs") / name
    with claimed(out):
        return _configure_and_train(name, options, out)


def _configure_and_train(name: str, options: argparse.Namespace, out: Path) -> Path:
    config, splits = None if options.restart else read_configuration(out), None
    if config is None:
        splits = open_splits(options, None)
        data, val = splits
        plan = configure(
            name,
            data,
            device=options.device,
            hours=1.0 if options.hours is None else options.hours,
            init=options.init,
            change=lambda config: change_config(config, options),
            time_step=partial(_time_step, data, options, out),
        )
        if val is not None:
            plan = replace(plan, reasons=(*plan.reasons, describe_validation(val)))
        config = plan.config
        if distributed.is_main():
            path = write_configuration(plan, out)
            print("\n".join((f"solo-train: chosen for {options.data}, in {path}:", *plan.reasons)))
    config = change_config(config, options)
    options.init = options.init or default_init(config)
    if options.validate_every is None:
        options.validate_every = -(-config.schedule.epochs // 5)
    return _train_validated(config, options, out, splits)


def _time_step(
    data: CocoDataset, options: argparse.Namespace, out: Path, config: Config
) -> tuple[float, str]:
    """Time of a training step, s, in the precision that is chosen if none was given; the reason."""
    measure = partial(_measure_step, data, options, config)
    step_s, reason = settle_precision(options, out, measure)
    if step_s is None:
        given = Numerics(precision=options.precision, channels_last=options.channels_last)
        step_s = measure(given)
    return step_s, reason


def _measure_step(
    data: CocoDataset, options: argparse.Namespace, config: Config, numerics: Numerics
) -> float:
    """Time of a training step in this process, s; trains a model that is thrown away."""
    data = data.with_contrast(config.input.contrast)
    schedule = replace(config.schedule, frozen_backbone_epochs=0)  # those steps are faster
    config = replace(config, schedule=schedule)
    with tempfile.TemporaryDirectory() as folder:
        run_options = replace(
            _run_options(options, Path(folder), options.seed, init=None),
            resume=False,
            precision=numerics.precision,
            channels_last=numerics.channels_last,
        )
        trainer = Trainer(config, data, run_options, None)
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
    provenance = {}
    if distributed.is_main():
        command = getattr(options, "command", None)
        provenance["training"] = describe_training(data, options.train_split, command)
    run_options = _run_options(options, out, seed, init)
    run_options = replace(run_options, label=label, provenance=provenance)
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


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = build_parser().parse_args(arguments)
    options.command = describe_command("solo-train", arguments)
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
