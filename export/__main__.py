"""solo-export: publishes a checkpoint in model_repo, verified against PyTorch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from export.config_json import describe_file, read_version
from export.engines import build_engines, build_kernels, make_packages
from export.errors import ExportError, PublishError
from export.exits import PLAIN_FILES, build_exits
from export.measure import (
    check_served,
    data_cases,
    describe_quality,
    evaluate_served,
    open_evaluation,
    read_curves,
)
from export.new_version import (
    LoadedCheckpoint,
    describe_model,
    pack_weights,
    read_object,
)
from export.onnx_graph import build_onnx, choose_opset
from export.options import list_stages, needs_variants, parse_arguments
from export.parity import Case, build_cases, canvas_sizes, compare, require_parity
from export.publish import Artefact, Release, add_artefacts, describe_served, keep_default, publish
from export.variants import VariantInputs, build_variants
from pipeline.errors import PipelineError
from pipeline.model_config import FileSpec, ModelConfig
from service.files import locked
from service.models.repository import CONFIG_FILE, ONNX_FILE, recover
from training.coco_metrics import AP_METRICS
from training.data.coco import CocoDataset, open_split
from training.data.records import DatasetError
from training.provenance import describe_command, find_commit
from training.reproduce import IMAGES_FILE, describe_measured
from training.run_folder import require_writable
from training.weights.formats import WEIGHTS_FILE, CheckpointError, load_model, load_provenance

DATA_IMAGES = 4
"""Images of the data set used in the comparison with PyTorch."""


def export(options: argparse.Namespace, command: str) -> list[Path]:
    """Exports a checkpoint, compares the graph with PyTorch and publishes it.

    Returns:
        The published graphs and packages.
    """
    require_writable(options.out)
    config, network = load_model(options.checkpoint)
    source = LoadedCheckpoint(options.checkpoint, config, network)
    given = options.provenance_json
    extra_provenance = read_object(given, "provenance") if given is not None else {}
    model = describe_model(source, options)
    opset = choose_opset(network, options.opset)
    data = open_evaluation(options, model)
    stages = _print_stages(list_stages(options))
    _print_progress(f"exporting {options.checkpoint} ({config.name}) with opset {opset}")
    next(stages)
    graph = build_onnx(network, opset=opset)
    file = describe_file(graph)
    model = model.model_copy(update={"files": {ONNX_FILE: FileSpec.model_validate(file)}})
    _print_progress(f"{ONNX_FILE} has {len(graph) / 1e6:.1f} MB")
    next(stages)
    cases = [*build_cases(canvas_sizes(config.input))]
    if data is not None:
        cases += data_cases(data, config.input, DATA_IMAGES)
    parity = {"graph": file, **compare(network, graph, cases)}
    require_parity(parity)
    _print_parity(parity)
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
    next(stages)
    check_served(model, graph)
    measured, reports = None, read_curves(options.checkpoint)
    if data is not None:
        next(stages)
        evaluation = evaluate_served(model, graph, data)
        max_dets = model.postprocess.max_instances
        described = describe_measured(evaluation, data, options.split, max_dets)
        measured = provenance["measured"] = described
        reports[IMAGES_FILE] = evaluation.format_images().encode()
        _print_progress(describe_quality(model, described, data))
    if needs_variants(options):
        next(stages)
    inputs = build_inputs(model, graph, options, data, measured)
    variants = make_variants(inputs, options, command)
    if options.exits:
        variants += make_exits(model, {ONNX_FILE: graph}, variants, cases, command)
    variants += make_packages(network, config, model, options.aoti, _print_progress)
    model = model.model_copy(update={"provenance": {**provenance, **extra_provenance}})
    release = Release(model, graph, parity, tuple(variants), weights, reports)
    kept = keep_default(options.out, model.name)
    next(stages)
    target = publish(options.out, release, force=options.force)
    image = data.image_folder / data.records[0].file_name if data else None
    for line in describe_served(target, kept, image):
        _print_progress(line)
    return [target / name for name in (ONNX_FILE, *(v.name for v in variants))]


def build_inputs(
    model: ModelConfig,
    graph: bytes,
    options: argparse.Namespace,
    data: CocoDataset | None,
    measured: dict[str, float] | None = None,
) -> VariantInputs:
    """The graph and data sets from which the variants of a version are built."""
    calibrated = "int8" in options.precision and options.data is not None
    return VariantInputs(
        model=model,
        graph=graph,
        evaluation=data,
        calibration=open_split(options, options.calibration_split) if calibrated else None,
        calibration_images=options.calibration_images,
        measured=measured,
    )


def make_variants(
    inputs: VariantInputs, options: argparse.Namespace, command: str
) -> list[Artefact]:
    """The graphs of the requested precisions, verified against float32."""
    return build_variants(
        options.precision,
        inputs,
        provenance={"command": command, "commit": find_commit()},
        accept_unrun=options.accept_unrun,
        progress=_print_progress,
    )


def make_exits(
    model: ModelConfig,
    graphs: dict[str, bytes],
    variants: list[Artefact],
    cases: Sequence[Case],
    command: str,
) -> list[Artefact]:
    """Graphs with early exits for `graphs` and for those of `variants` that run on the CPU."""
    new = {v.name: v.data for v in variants if v.name in PLAIN_FILES}
    made = build_exits(
        model, {**graphs, **new}, cases, {"command": command, "commit": find_commit()}
    )
    for artefact in made:
        found = artefact.parity["comparison"]
        _print_progress(
            f"{artefact.name}: the {found['candidates']} candidates of {found['canvases']} "
            "canvases are bit-identical"
        )
    return made


def find_measured(model: ModelConfig, data: CocoDataset, split: str) -> dict[str, float] | None:
    """The AP in a version's provenance; None if the split, its size or `max_dets` differ."""
    found = model.provenance.get("measured")
    wanted = {"split": split, "images": len(data), "max_dets": model.postprocess.max_instances}
    if not isinstance(found, dict) or any(found.get(k) != v for k, v in wanted.items()):
        return None
    return {name: float(found[name]) for name in AP_METRICS if name in found}


def add_variants(options: argparse.Namespace, command: str) -> list[Path]:
    """Adds graphs of other precisions to a published version.

    Returns:
        The added files.

    Raises:
        PublishError: The folder is not a published version, or its graph has another hash.
    """
    target = options.variants_of
    folder = target.parent
    if not target.name.isdecimal():
        raise PublishError(f"{target} is not a version: expected <model_repo>/<name>/<number>")
    model = read_version(folder, int(target.name))
    with locked(folder.parent):
        recover(folder)  # what was interrupted may have left the graphs elsewhere
    _require_replaceable(target, model, options)
    plain = [ONNX_FILE, *(name for name in PLAIN_FILES if name in model.files and options.exits)]
    graphs = {name: _read_graph(target, model, name) for name in plain}
    data = open_evaluation(options, model)
    measured = find_measured(model, data, options.split) if data else None
    inputs = build_inputs(model, graphs[ONNX_FILE], options, data, measured)
    variants = make_variants(inputs, options, command)
    if options.exits:
        cases = [*build_cases(canvas_sizes(model.input))]
        if data is not None:
            cases += data_cases(data, model.input, DATA_IMAGES)
        variants += make_exits(model, graphs, variants, cases, command)
    add_artefacts(folder, model.version, variants, force=options.force)
    return [target / v.name for v in variants]


def _require_replaceable(target: Path, model: ModelConfig, options: argparse.Namespace) -> None:
    """Checks that the files to be written may be replaced.

    Raises:
        PublishError: A file exists and --force is not given, or a graph would be replaced but not
            its graph with early exits.
    """
    wanted = {f"model.{p}.onnx" for p in options.precision}
    stale = {PLAIN_FILES.get(name, "") for name in wanted} & set(model.files)
    if options.exits:
        wanted |= {PLAIN_FILES[name] for name in PLAIN_FILES if name in {*model.files, *wanted}}
    listed = sorted(wanted & set(model.files))
    if listed and not options.force:
        raise PublishError(f"{target / listed[0]} already exists; --force replaces it")
    if stale and not options.exits:
        raise PublishError(
            f"{target / stale.pop()} is built from a graph that would be replaced; add --exits"
        )


def _read_graph(target: Path, model: ModelConfig, name: str) -> bytes:
    graph = (target / name).read_bytes()
    if describe_file(graph) != model.files[name].model_dump():
        raise PublishError(f"{target / name} differs from its entry in {CONFIG_FILE}")
    return graph


def _hash(file: Path) -> dict[str, Any]:
    return describe_file(file.read_bytes())


def _print_progress(text: str) -> None:
    print(f"solo-export: {text}", flush=True)


def _print_stages(names: Sequence[str]) -> Iterator[None]:
    """Prints the name of the stage that begins with each `next`."""
    for number, name in enumerate(names, 1):
        _print_progress(f"[{number}/{len(names)}] {name}")
        yield


def _print_parity(report: dict[str, Any]) -> None:
    total = report["total"]
    _print_progress(
        f"{total['candidates_torch']} candidates in {len(report['cases'])} batches: "
        f"{total['unmatched']} unmatched, scores within {total['max_score_difference']:.1e}, "
        f"masks within {total['max_mask_difference']:.1e}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    try:
        run(options, describe_command("solo-export", arguments))
    except (ExportError, CheckpointError, DatasetError, PipelineError, OSError) as error:
        print(f"solo-export: {error}", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace, command: str) -> None:
    """Builds what the options request: kernels, then a version or variants, then engines."""
    if options.kernels is not None:
        files = build_kernels(options.kernels, _print_progress)
        _print_progress(f"{len(files)} files are in {files[0].parent}")
    target = options.variants_of
    if options.checkpoint is not None or options.precision or options.exits:
        files = export(options, command) if target is None else add_variants(options, command)
        target = files[0].parent
        names = ", ".join(file.name for file in files)
        _print_progress(f"published {names}, each with its parity report, in {target}")
    if options.tensorrt:
        for file in build_engines(target, options.tensorrt, _print_progress):
            _print_progress(f"the engine is {file}")


if __name__ == "__main__":
    raise SystemExit(main())
