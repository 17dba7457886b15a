"""solo-export: a checkpoint becomes a version in model_repo, proven against PyTorch."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export.errors import ExportError
from export.onnx_graph import (
    DEFAULT_OPSET,
    DEFORM_OPSET,
    OPSETS,
    build_onnx,
    choose_opset,
    num_candidates,
)
from export.parity import Case, build_cases, canvas_sizes, compare, require_parity
from export.publish import (
    PARITY_FILE,
    Release,
    describe_file,
    next_version,
    publish,
    require_free,
)
from service.backends.base import BackendOptions
from service.pipeline.errors import PipelineError
from service.pipeline.model_config import FileSpec, ModelConfig
from service.pipeline.preprocess import prepare
from service.registry import CONFIG_FILE, ONNX_FILE, ModelRefused, load_version
from training.checkpoint import CheckpointError, load_model, load_provenance
from training.coco_metrics import mask_ap
from training.configs.schema import Config
from training.data.coco import CocoDataset, DatasetError
from training.evaluate import RepositoryPredictor, predict
from training.model.solo import Solo

PENDING = {"sha256": "0" * 64, "bytes": 1}
DATA_IMAGES = 4
"""Images of the data set that join the comparison with PyTorch."""


def build_parser() -> argparse.ArgumentParser:
    """The command line of solo-export."""
    parser = argparse.ArgumentParser(
        prog="solo-export",
        description="Exports a checkpoint to ONNX, compares the graph with PyTorch and publishes "
        "it as a version of a model_repo: <out>/<name>/<version>/model.onnx with its parity.json, "
        "and config.json with the file's SHA-256. A graph that disagrees is not published.",
        epilog="Example: solo-export runs/nuclei/best.pt --out model_repo --data datasets/nuclei",
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint of solo-train or solo-import")
    parser.add_argument("--out", type=Path, required=True, help="the model_repo to publish into")
    parser.add_argument("--name", help="name of the model (default: its configuration's)")
    parser.add_argument("--version", type=int, help="number of the version (default: the next)")
    parser.add_argument("--force", action="store_true", help="replace the version if it is there")
    parser.add_argument(
        "--opset",
        type=int,
        choices=OPSETS,
        help=f"ONNX operator set (default: {DEFAULT_OPSET}, or {DEFORM_OPSET} for a network with "
        "deformable convolutions, which lower ones do not have)",
    )
    parser.add_argument("--description", help="one line (default: the configuration's)")
    parser.add_argument("--max-batch", type=int, default=8, help="most canvases a run (default: 8)")
    parser.add_argument("--score-threshold", type=float, help="least score of a response's objects")
    parser.add_argument("--max-instances", type=int, help="most objects of a response")
    parser.add_argument(
        "--provenance-json",
        type=Path,
        metavar="FILE",
        help="JSON object to add to the provenance, e.g. training data and its licence",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="COCO-format folder: some of its images join the comparison, and the AP that the "
        "published graph reaches on it goes into the provenance",
    )
    parser.add_argument("--split", default="val", help="annotation file of --data (default: val)")
    return parser


@dataclass(frozen=True)
class Source:
    """A checkpoint that is to be exported."""

    file: Path
    config: Config
    network: Solo


def choose_version(config: Config, options: argparse.Namespace) -> tuple[str, int]:
    """Name and version to publish, refused now rather than after the work if they are taken."""
    name = options.name or config.name
    if options.version is None:
        return name, next_version(options.out / name)
    require_free(options.out, name, options.version, force=options.force)
    return name, options.version


def describe_model(source: Source, options: argparse.Namespace) -> ModelConfig:
    """The version's part of config.json; its file and provenance are not known yet.

    Raises:
        ExportError: The checkpoint names no classes, or an option has a wrong value.
    """
    config = source.config
    if len(config.classes) != config.num_classes:
        raise ExportError(
            f"{source.file} names {len(config.classes)} classes, but its network has "
            f"{config.num_classes}; solo-train writes the data set's"
        )
    changes = {"score_threshold": options.score_threshold, "max_instances": options.max_instances}
    postprocess = config.postprocess.model_dump()
    postprocess.update({name: value for name, value in changes.items() if value is not None})
    name, version = choose_version(config, options)
    try:
        return ModelConfig.model_validate(
            {
                "name": name,
                "version": version,
                "task": config.task,
                "description": options.description or config.description,
                "input": config.input.model_dump(),
                "classes": [c.model_dump() for c in config.classes],
                "candidates": num_candidates(source.network),
                "mask_stride": min(config.model.head.mask_strides),
                "postprocess": postprocess,
                "limits": {"max_batch": options.max_batch},
                "files": {ONNX_FILE: PENDING},
            }
        )
    except ValueError as error:
        raise ExportError(f"config.json would not be valid: {error}") from error


def read_provenance(file: Path | None) -> dict[str, Any]:
    """What the caller knows about the model.

    Raises:
        ExportError: The file is missing or no JSON object.
    """
    if file is None:
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{file} cannot be read as provenance: {error}") from error
    if not isinstance(content, dict):
        raise ExportError(f"{file} holds a {type(content).__name__}, expected a JSON object")
    return content


def find_commit() -> str | None:
    """The commit of the sources, with a mark if they are changed; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        found = subprocess.run(
            [*command, "--exclude", "*"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() or None


def describe_command(arguments: list[str]) -> str:
    """The command without the folders of one machine."""
    parts = [Path(a).name if Path(a).is_absolute() else a for a in arguments]
    return shlex.join(["solo-export", *parts])


def data_cases(data: CocoDataset, config: Config) -> list[Case]:
    """The first canvases of a data set's first images, as the server would prepare them."""
    cases = []
    for index in range(min(DATA_IMAGES, len(data))):
        tiles = prepare(data.image(index), config.input).tiles[:2]
        images = np.stack([tile.image for tile in tiles])
        cases.append(Case("data", images, np.array([tile.valid_hw for tile in tiles], np.int64)))
    return cases


def measure_ap(
    root: Path, model: ModelConfig, data: CocoDataset, split: str
) -> dict[str, int | str | float]:
    """Mask AP of a staged version, through the loader, engine and pipeline that serve it."""
    max_dets = model.postprocess.max_instances
    predictor = RepositoryPredictor(root / model.name, model.version, max_dets=max_dets)
    results = predict(data, predictor, progress=True)
    numbers = mask_ap(data.annotation_file, results, max_dets=max_dets)
    rounded = {name: round(value, 4) for name, value in numbers.items()}
    return {"split": split, "images": len(data), "max_dets": max_dets, **rounded}


def check_served(root: Path, model: ModelConfig) -> None:
    """Loads a staged version as the server will.

    Raises:
        ExportError: The server would refuse it.
    """
    try:
        loaded = load_version(root / model.name, model.version, BackendOptions(device="cpu"))
    except ModelRefused as error:
        raise ExportError(f"the server would refuse the export: {error}") from error
    loaded.backend.close()


def export(options: argparse.Namespace, command: str) -> Path:
    """Runs the whole export.

    Returns:
        The published version's folder.
    """
    config, network = load_model(options.checkpoint)
    source = Source(options.checkpoint, config, network)
    given = read_provenance(options.provenance_json)
    model = describe_model(source, options)
    opset = choose_opset(network, options.opset)
    data = CocoDataset(options.data, options.split) if options.data else None
    _say(f"exporting {options.checkpoint} ({config.name}) with opset {opset}")
    graph = build_onnx(network, opset=opset)
    file = describe_file(graph)
    model = model.model_copy(update={"files": {ONNX_FILE: FileSpec.model_validate(file)}})
    _say(f"{len(graph) / 1e6:.1f} MB; comparing with PyTorch")
    cases = [*build_cases(canvas_sizes(config.input))]
    if data is not None:
        cases += data_cases(data, config)
    parity = {"graph": file, **compare(network, graph, cases)}
    require_parity(parity)
    _say_parity(parity)
    provenance: dict[str, Any] = {
        "config": config.name,
        "commit": find_commit(),
        "command": command,
        "checkpoint": {"file": options.checkpoint.name, **_hash(options.checkpoint)},
        "exporter": {"torch": torch.__version__.split("+")[0], "opset": opset},
        **load_provenance(options.checkpoint),
    }
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder)
        publish(staged, Release(model, graph, parity))
        check_served(staged, model)
        if data is not None:
            provenance["measured"] = measure_ap(staged, model, data, options.split)
    model = model.model_copy(update={"provenance": {**provenance, **given}})
    return publish(options.out, Release(model, graph, parity), force=options.force)


def _hash(file: Path) -> dict[str, Any]:
    return describe_file(file.read_bytes())


def _say(text: str) -> None:
    print(f"solo-export: {text}", flush=True)


def _say_parity(report: dict[str, Any]) -> None:
    total = report["total"]
    _say(
        f"{total['candidates_torch']} candidates in {len(report['cases'])} batches: "
        f"{total['unmatched']} unmatched, scores within {total['max_score_difference']:.1e}, "
        f"masks within {total['max_mask_difference']:.1e}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = build_parser().parse_args(arguments)
    try:
        target = export(options, describe_command(arguments))
    except (ExportError, CheckpointError, DatasetError, PipelineError, OSError) as error:
        print(f"solo-export: {error}", file=sys.stderr)
        return 1
    _say(f"published {target / ONNX_FILE}, {PARITY_FILE} and {target.parent / CONFIG_FILE}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
