"""solo-export: a checkpoint becomes a version in model_repo, proven against PyTorch."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from export.engines import build_engines, build_kernels, make_packages
from export.errors import ExportError, PublishError
from export.exits import PLAIN_FILES, build_exits
from export.measure import check_served, data_cases, measure_ap
from export.onnx_graph import build_onnx, choose_opset, num_candidates
from export.options import describe_command, parse_arguments
from export.parity import Case, build_cases, canvas_sizes, compare, require_parity
from export.publish import (
    Artefact,
    Release,
    add_artefacts,
    describe_file,
    next_version,
    publish,
    read_version,
    require_free,
)
from export.variants import Material, build_variants
from pipeline.errors import PipelineError
from pipeline.model_config import FileSpec, ModelConfig
from service.models.repository import CONFIG_FILE, ONNX_FILE
from training.configs.schema import Config
from training.data.coco import CocoDataset, DatasetError
from training.model.solo import Solo
from training.weights.formats import (
    WEIGHTS_FILE,
    CheckpointError,
    load_model,
    load_provenance,
    save_checkpoint,
)

PENDING = {"sha256": "0" * 64, "bytes": 1}
DATA_IMAGES = 4
"""Images of the data set that join the comparison with PyTorch."""


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


def export(options: argparse.Namespace, command: str) -> list[Path]:
    """Exports, compares and publishes a checkpoint.

    Returns:
        The published files.
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
        cases += data_cases(data, config.input, DATA_IMAGES)
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
    weights = pack_weights(source) if options.weights else None
    if weights is not None:
        provenance["weights"] = {"file": WEIGHTS_FILE, **describe_file(weights)}
    check_served(model, graph)
    measured = None
    if data is not None:
        measured = measure_ap(model, graph, data)
        head = {"split": options.split, "images": len(data)}
        max_dets = model.postprocess.max_instances
        provenance["measured"] = {**head, "max_dets": max_dets, **measured}
    material = build_material(model, graph, options, data, measured)
    variants = make_variants(material, options, command)
    if options.exits:
        variants += make_exits(model, {ONNX_FILE: graph}, variants, cases, command)
    variants += make_packages(network, config, model, options.aoti, _say)
    model = model.model_copy(update={"provenance": {**provenance, **given}})
    release = Release(model, graph, parity, tuple(variants), weights)
    target = publish(options.out, release, force=options.force)
    return [target / name for name in (ONNX_FILE, *(v.name for v in variants))]


def pack_weights(source: Source) -> bytes:
    """A checkpoint of the exported network without the state of its training."""
    content = {
        "model": source.network.state_dict(),
        "ema": {},
        "provenance": load_provenance(source.file),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / WEIGHTS_FILE
        save_checkpoint(path, source.config, content)
        return path.read_bytes()


def build_material(
    model: ModelConfig,
    graph: bytes,
    options: argparse.Namespace,
    data: CocoDataset | None,
    measured: dict[str, float] | None = None,
) -> Material:
    """What the variants of a version are made of and measured on."""
    calibrated = "int8" in options.precision and options.data is not None
    return Material(
        model=model,
        graph=graph,
        evaluation=data,
        calibration=CocoDataset(options.data, options.calibration_split) if calibrated else None,
        calibration_images=options.calibration_images,
        measured=measured,
    )


def make_variants(material: Material, options: argparse.Namespace, command: str) -> list[Artefact]:
    """The graphs of other precisions that were asked for, compared and judged."""
    return build_variants(
        options.precision,
        material,
        provenance={"command": command, "commit": find_commit()},
        accept_unrun=options.accept_unrun,
        say=_say,
    )


def make_exits(
    model: ModelConfig,
    graphs: dict[str, bytes],
    variants: list[Artefact],
    cases: Sequence[Case],
    command: str,
) -> list[Artefact]:
    """Graphs with early exits, of those that are published and of new ones that the CPU runs."""
    new = {v.name: v.data for v in variants if v.name in PLAIN_FILES}
    made = build_exits(
        model, {**graphs, **new}, cases, {"command": command, "commit": find_commit()}
    )
    for artefact in made:
        found = artefact.parity["comparison"]
        _say(
            f"{artefact.name}: the {found['candidates']} candidates of {found['canvases']} "
            "canvases are the same bit for bit"
        )
    return made


def find_measured(model: ModelConfig, data: CocoDataset, split: str) -> dict[str, float] | None:
    """The AP of a published version from its provenance, if it is of such a split.

    The entry also names the graph by its hash, so it is that graph's; the split is known by name
    and size.
    """
    found = model.provenance.get("measured")
    wanted = {"split": split, "images": len(data), "max_dets": model.postprocess.max_instances}
    if not isinstance(found, dict) or any(found.get(k) != v for k, v in wanted.items()):
        return None
    return {name: float(v) for name, v in found.items() if name not in wanted}


def add_variants(options: argparse.Namespace, command: str) -> list[Path]:
    """Adds graphs of other precisions to a version that is published.

    Returns:
        The added files.

    Raises:
        PublishError: The folder is no published version, or its graph has another hash.
    """
    target = options.variants_of
    folder = target.parent
    if not target.name.isdecimal():
        raise PublishError(f"{target} is no version: expected <model_repo>/<name>/<number>")
    model = read_version(folder, int(target.name))
    _refuse_listed(target, model, options)
    plain = [ONNX_FILE, *(name for name in PLAIN_FILES if name in model.files and options.exits)]
    graphs = {name: _read_graph(target, model, name) for name in plain}
    data = CocoDataset(options.data, options.split) if options.data else None
    measured = find_measured(model, data, options.split) if data else None
    material = build_material(model, graphs[ONNX_FILE], options, data, measured)
    variants = make_variants(material, options, command)
    if options.exits:
        cases = [*build_cases(canvas_sizes(model.input))]
        if data is not None:
            cases += data_cases(data, model.input, DATA_IMAGES)
        variants += make_exits(model, graphs, variants, cases, command)
    add_artefacts(folder, model.version, variants, force=options.force)
    return [target / v.name for v in variants]


def _refuse_listed(target: Path, model: ModelConfig, options: argparse.Namespace) -> None:
    """Refuses to replace files without --force, or a graph without the one made of it.

    Raises:
        PublishError: Names the file.
    """
    wanted = {f"model.{p}.onnx" for p in options.precision}
    stale = {PLAIN_FILES.get(name, "") for name in wanted} & set(model.files)
    if options.exits:
        wanted |= {PLAIN_FILES[name] for name in PLAIN_FILES if name in {*model.files, *wanted}}
    listed = sorted(wanted & set(model.files))
    if listed and not options.force:
        raise PublishError(f"{target / listed[0]} exists already; --force replaces it")
    if stale and not options.exits:
        raise PublishError(
            f"{target / stale.pop()} is made of a graph that would be replaced; add --exits"
        )


def _read_graph(target: Path, model: ModelConfig, name: str) -> bytes:
    graph = (target / name).read_bytes()
    if describe_file(graph) != model.files[name].model_dump():
        raise PublishError(f"{target / name} is not the file that {CONFIG_FILE} describes")
    return graph


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
    options = parse_arguments(arguments)
    try:
        run(options, describe_command(arguments))
    except (ExportError, CheckpointError, DatasetError, PipelineError, OSError) as error:
        print(f"solo-export: {error}", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace, command: str) -> None:
    """Makes everything that was asked for: kernels, a version or its variants, engines."""
    if options.kernels is not None:
        files = build_kernels(options.kernels, _say)
        _say(f"{len(files)} files are in {files[0].parent}")
    target = options.variants_of
    if options.checkpoint is not None or options.precision or options.exits:
        files = export(options, command) if target is None else add_variants(options, command)
        target = files[0].parent
        names = ", ".join(file.name for file in files)
        _say(f"published {names}, each with its parity report, in {target}")
    for file in build_engines(target, options.tensorrt, _say) if options.tensorrt else []:
        _say(f"the engine is {file}")


if __name__ == "__main__":
    raise SystemExit(main())
