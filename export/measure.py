"""Canvases of a data set for comparisons, and the AP of a graph as the server runs it."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from export.config_json import describe_file, merge_config
from export.errors import ExportError
from export.parity import Case
from pipeline.model_config import FileSpec, InputSpec, ModelConfig
from pipeline.preprocess import prepare
from service.engines.base import BackendOptions
from service.models.repository import (
    ONNX_FILE,
    ModelRefused,
    format_json,
    load_version,
    write_version,
)
from training.coco_metrics import AP_METRICS
from training.data.coco import CocoDataset, open_split
from training.data.records import DatasetError
from training.data.validate import check_classes
from training.distributed import warn
from training.evaluation_report import ALL, EvaluationReport, evaluate_results
from training.predictors import RepositoryPredictor, predict
from training.run_log import CURVES_FILE

CASE_TILES = 2
"""Maximum number of canvases per image in a comparison."""


def data_cases(data: CocoDataset, spec: InputSpec, count: int) -> list[Case]:
    """One case per image, with its first canvases as preprocessed by the server.

    Args:
        data: The data set.
        spec: Input specification of the model.
        count: Number of images, from the first.
    """
    cases = []
    for index in range(min(count, len(data))):
        tiles = prepare(data.image(index), spec).tiles[:CASE_TILES]
        images = np.stack([tile.image for tile in tiles])
        cases.append(Case("data", images, np.array([tile.valid_hw for tile in tiles], np.int64)))
    return cases


def open_evaluation(options: argparse.Namespace, model: ModelConfig) -> CocoDataset | None:
    """The images of --data on which the AP is measured; None without --data.

    Raises:
        DatasetError: They cannot be used, have no annotations, or classes that the model lacks.
    """
    if not options.data:
        return None
    data = open_split(options, options.split)
    if not data.labelled:
        raise DatasetError(f"{data.report.source} has no annotations to measure the AP on")
    check_classes(data.checked, model.classes, f"the model {model.name}")
    warn("solo-export", data.report.warnings())
    return data


@contextmanager
def _staged(model: ModelConfig, graph: bytes) -> Iterator[Path]:
    """A temporary model folder with one version of one graph."""
    files = {ONNX_FILE: FileSpec.model_validate(describe_file(graph))}
    config = merge_config(None, model.model_copy(update={"files": files}))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / model.name
        write_version(folder, model.version, {ONNX_FILE: graph}, format_json(config))
        yield folder


def check_served(model: ModelConfig, graph: bytes) -> None:
    """Loads a graph with the server's loader.

    Raises:
        ExportError: The loader rejects it.
    """
    with _staged(model, graph) as folder:
        try:
            loaded = load_version(folder, model.version, BackendOptions(device="cpu"))
        except ModelRefused as error:
            raise ExportError(f"the server would reject the export: {error}") from error
        loaded.backend.close()


def evaluate_served(model: ModelConfig, graph: bytes, data: CocoDataset) -> EvaluationReport:
    """Scores of a graph, run by the server's loader, engine and pipeline."""
    max_dets = model.postprocess.max_instances
    with _staged(model, graph) as folder:
        predictor = RepositoryPredictor(folder, model.version, max_dets=max_dets)
        results = predict(data, predictor, progress=True)
    return evaluate_results(
        data, results, max_dets=max_dets, score_threshold=model.postprocess.score_threshold
    )


def measure_ap(model: ModelConfig, graph: bytes, data: CocoDataset) -> dict[str, float]:
    """COCO mask metrics of a graph, as it is served."""
    row = evaluate_served(model, graph, data).rows[ALL]
    return {name: round(row[name], 4) for name in AP_METRICS}


def describe_quality(model: ModelConfig, measured: Mapping[str, Any], data: CocoDataset) -> str:
    """The AP, and how many objects an answer has at the model's score threshold."""
    found = round(measured["count_ratio"] * data.report.objects)
    return (
        f"AP {measured['AP']:.3f}, AP50 {measured['AP50']:.3f} on {len(data)} images; at the score "
        f"threshold {model.postprocess.score_threshold:g} F1 is {measured['F1_50']:.3f}: the model "
        f"finds {found} objects where {data.report.objects} are labelled (--score-threshold "
        "changes it, and ?score_threshold= in a request)"
    )


def read_curves(checkpoint: Path) -> dict[str, bytes]:
    """Losses and AP during the training of a checkpoint, if they lie beside it."""
    path = checkpoint.parent / CURVES_FILE
    return {CURVES_FILE: path.read_bytes()} if path.is_file() else {}
