"""The command line of solo-export."""

from __future__ import annotations

import argparse
from pathlib import Path

from export.engines import parse_package
from export.onnx_graph import DEFAULT_OPSET, DEFORM_OPSET, OPSETS
from export.quantize import CALIBRATION_IMAGES
from export.to_aoti import AotiOptions
from export.variants import PRECISIONS
from training.data.formats import add_format_options

CHECKPOINT_ONLY = (
    *("out", "name", "version", "opset", "description", "score_threshold", "max_instances"),
    "provenance_json",
    "card",
    "weights",
)
"""Options that define a new version; not allowed with --variants-of."""


def build_parser() -> argparse.ArgumentParser:
    """The parser; `parse_arguments` also checks combinations of options."""
    parser = argparse.ArgumentParser(
        prog="solo-export",
        description="Exports a checkpoint to ONNX, compares the graph with PyTorch and publishes "
        "it as a version in a model_repo: <out>/<name>/<version>/model.onnx with parity.json, and "
        "config.json with its SHA-256. A graph that differs from PyTorch is not published. "
        "--precision adds graphs of other precisions, each compared with the float32 graph; "
        "--exits adds graphs with early exits, which are faster on the CPU.",
        epilog="Examples: solo-export runs/nuclei/best.pt --out model_repo --data datasets/nuclei "
        "--precision int8 | solo-export --variants-of model_repo/nuclei/2 --precision fp16 bf16",
    )
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", help="checkpoint of solo-train or solo-import"
    )
    parser.add_argument("--out", type=Path, help="model_repo to publish to")
    parser.add_argument("--name", help="model name (default: from the configuration)")
    parser.add_argument("--version", type=int, help="version number (default: the next)")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    parser.add_argument(
        "--opset",
        type=int,
        choices=OPSETS,
        help=f"ONNX operator set (default: {DEFAULT_OPSET}, or {DEFORM_OPSET} for a network with "
        "deformable convolutions, which lower opsets lack)",
    )
    parser.add_argument(
        "--description", help="description, one line (default: from the configuration)"
    )
    parser.add_argument(
        "--card",
        type=Path,
        metavar="FILE",
        help="JSON object that says what the model is for: domain, object_size_px, um_per_px, "
        "training_data, licence, attribution (default: the card of the name's last version)",
    )
    parser.add_argument(
        "--max-batch", type=int, default=16, help="maximum canvases per engine call (default: 16)"
    )
    parser.add_argument(
        "--score-threshold",
        type=float,
        help="minimum score of instances in a response (default: from the configuration)",
    )
    parser.add_argument(
        "--max-instances",
        type=int,
        help="maximum instances in a response (default: from the configuration)",
    )
    parser.add_argument(
        "--provenance-json",
        type=Path,
        metavar="FILE",
        help="JSON object to add to the provenance, e.g. the training data and their licence",
    )
    parser.add_argument(
        "--weights",
        action="store_true",
        default=None,
        help="add weights.pt, a checkpoint without the optimizer's state that solo-train --init "
        "<model_repo>/<name> starts from; it is not served",
    )
    _add_data(parser)
    _add_variants(parser)
    _add_engines(parser)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of labelled images: some of them are used in the comparisons, and the AP of "
        "the published graph on them is recorded in the provenance",
    )
    add_format_options(parser)
    parser.add_argument("--split", default="val", help="annotation file of --data (default: val)")


def _add_variants(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("other precisions")
    group.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        default=[],
        help="add model.<precision>.onnx: fp16 and bf16 for GPUs, int8 for the CPU (requires "
        "--data)",
    )
    group.add_argument(
        "--variants-of",
        type=Path,
        metavar="VERSION_DIR",
        help="add variants to this published version, <model_repo>/<name>/<version>, instead of "
        "exporting a checkpoint",
    )
    group.add_argument(
        "--calibration-split",
        default="train",
        metavar="SPLIT",
        help="annotation file of --data with the images for int8 calibration (default: train)",
    )
    group.add_argument(
        "--calibration-images",
        type=int,
        default=CALIBRATION_IMAGES,
        metavar="N",
        help=f"number of calibration images (default: {CALIBRATION_IMAGES})",
    )
    group.add_argument(
        "--exits",
        action="store_true",
        help="add model.exits.onnx for the CPU: it skips the masks of pyramid levels without "
        "candidates, with bit-identical results; also for the int8 graph, if there is one",
    )
    group.add_argument(
        "--accept-unrun",
        action="store_true",
        help="publish precisions that no engine on this machine can run, after comparing their "
        "emulation only",
    )


def needs_variants(options: argparse.Namespace) -> bool:
    """Whether other files than model.onnx are built for a version."""
    return bool(options.precision or options.aoti or options.exits)


def list_stages(options: argparse.Namespace) -> list[str]:
    """What the export of a checkpoint does, in order."""
    return [
        "building the ONNX graph",
        "comparing it with PyTorch",
        "loading it as the server does",
        *(["measuring its AP"] if options.data else []),
        *(["building the other files of the version"] if needs_variants(options) else []),
        "publishing it",
    ]


def _package(text: str) -> AotiOptions:
    try:
        return parse_package(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _add_engines(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("other engines")
    group.add_argument(
        "--aoti",
        nargs="+",
        type=_package,
        default=[],
        metavar="DEVICE:PRECISION",
        help="add AOTInductor packages, e.g. cuda:fp16 for this machine's GPU, or cpu:fp32",
    )
    group.add_argument(
        "--tensorrt",
        nargs="+",
        choices=("fp32", "fp16", "bf16"),
        default=[],
        help="build TensorRT engines of these precisions in this machine's engine cache",
    )
    group.add_argument(
        "--kernels",
        nargs="*",
        metavar="SM",
        help="compile the CUDA kernels for these architectures, e.g. sm_90 (default: all known); "
        "requires neither a GPU nor a checkpoint",
    )


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parses the options; exits with a usage error if they cannot be combined."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.calibration_images < 1:
        parser.error(f"--calibration-images is {options.calibration_images}, expected at least 1")
    if options.variants_of is None:
        if options.checkpoint is None and options.kernels is not None and not options.tensorrt:
            return options
        if options.checkpoint is None:
            parser.error("a checkpoint or --variants-of is required")
        if options.out is None:
            parser.error("--out is required: the model_repo to publish to")
        return options
    if options.checkpoint is not None:
        parser.error(f"--variants-of does not accept a checkpoint, got {options.checkpoint}")
    if options.aoti:
        parser.error("--aoti requires a checkpoint: packages are compiled from the network")
    if not options.precision and not options.tensorrt and not options.exits:
        parser.error("--variants-of requires --precision, --exits or --tensorrt")
    given = [name for name in CHECKPOINT_ONLY if getattr(options, name) is not None]
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        parser.error(f"{names}: not allowed with --variants-of")
    return options
