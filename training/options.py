"""The command line of solo-train."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import get_args

from service.cores import count_cores
from training.configs import list_configs
from training.configs.coco import SCHEDULES
from training.configs.recipes import Recipe
from training.configs.tables import TABLES
from training.data.formats import add_format_options
from training.objective import DTYPES
from training.resume import CHANGEABLE
from training.table_command import TABLE_MAX_DETS
from training.termination import TERMINATED_STATUS

MAX_WORKERS = 8


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
        help="data loading processes (1; with cuda the cores of each process, at most "
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
        choices=["auto", *DTYPES],
        help="precision of the convolutions; weights, masks and losses are always fp32; auto: bf16 "
        "with --channels-last if that is faster here, which a resumed run keeps (fp32; without "
        "CONFIG auto)",
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
        "--channels-last",
        action="store_true",
        help="use the channels-last memory layout; in fp32 on a CPU with AVX-512, PyTorch 2.13 "
        "crashes with it if a strided 1x1 convolution has fewer than 16 channels",
    )
    group.add_argument(
        "--compile", action="store_true", help="compile the network with torch.compile"
    )
    group.add_argument(
        "--scale-lr",
        action="store_true",
        help="multiply schedule.lr by batch size / batch size of the configuration",
    )


def choose_workers(options: argparse.Namespace) -> int:
    """The given number of data loading processes, or one that fits the machine."""
    if options.workers is not None:
        return int(options.workers)
    if not options.device.startswith("cuda"):
        return 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MAX_WORKERS, count_cores() // processes))
