"""Canvases of a data set for comparisons, and the AP of a graph as the server runs it."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
from training.coco_metrics import mask_ap
from training.data.coco import CocoDataset, open_split
from training.data.records import DatasetError
from training.data.validate import check_classes
from training.distributed import warn
from training.evaluate import RepositoryPredictor, Result, predict

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


def predict_served(model: ModelConfig, graph: bytes, data: CocoDataset) -> list[Result]:
    """COCO results of a graph at every score, run by the server's loader, engine and pipeline."""
    with _staged(model, graph) as folder:
        predictor = RepositoryPredictor(
            folder, model.version, max_dets=model.postprocess.max_instances
        )
        return predict(data, predictor, progress=True)


def score(model: ModelConfig, results: list[Result], data: CocoDataset) -> dict[str, float]:
    """COCO mask metrics with as many detections per image as are served."""
    numbers = mask_ap(data.truth(), results, max_dets=model.postprocess.max_instances)
    return {name: round(value, 4) for name, value in numbers.items()}


def measure_ap(model: ModelConfig, graph: bytes, data: CocoDataset) -> dict[str, float]:
    """COCO mask metrics of a graph, as it is served."""
    return score(model, predict_served(model, graph, data), data)


def describe_quality(
    model: ModelConfig, measured: dict[str, float], results: list[Result], data: CocoDataset
) -> str:
    """The AP, and how many objects an answer has at the model's score threshold."""
    threshold = model.postprocess.score_threshold
    found = sum(result["score"] >= threshold for result in results)
    return (
        f"AP {measured['AP']:.3f}, AP50 {measured['AP50']:.3f} on {len(data)} images; at the score "
        f"threshold {threshold:g} the model finds {found} objects where {data.report.objects} are "
        "labelled (--score-threshold changes it, and ?score_threshold= in a request)"
    )
