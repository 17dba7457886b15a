"""What an export is measured on: canvases of a data set, and its AP as it would be served."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from export.errors import ExportError
from export.parity import Case
from export.publish import Release, describe_file, publish
from pipeline.model_config import FileSpec, InputSpec, ModelConfig
from pipeline.preprocess import prepare
from service.engines.base import BackendOptions
from service.models.repository import ONNX_FILE, ModelRefused, load_version
from training.coco_metrics import mask_ap
from training.data.coco import CocoDataset
from training.evaluate import RepositoryPredictor, predict

CASE_TILES = 2
"""Most canvases of one image in a comparison."""


def data_cases(data: CocoDataset, spec: InputSpec, count: int) -> list[Case]:
    """Canvases of the first images of a data set, as the server would prepare them."""
    cases = []
    for index in range(min(count, len(data))):
        tiles = prepare(data.image(index), spec).tiles[:CASE_TILES]
        images = np.stack([tile.image for tile in tiles])
        cases.append(Case("data", images, np.array([tile.valid_hw for tile in tiles], np.int64)))
    return cases


@contextmanager
def _staged(model: ModelConfig, graph: bytes) -> Iterator[Path]:
    """A model_repo folder with one version of one graph."""
    files = {ONNX_FILE: FileSpec.model_validate(describe_file(graph))}
    with tempfile.TemporaryDirectory() as name:
        release = Release(model.model_copy(update={"files": files}), graph, {"passed": True})
        yield publish(Path(name), release).parent


def check_served(model: ModelConfig, graph: bytes) -> None:
    """Loads a graph as the server will.

    Raises:
        ExportError: The server would refuse it.
    """
    with _staged(model, graph) as folder:
        try:
            loaded = load_version(folder, model.version, BackendOptions(device="cpu"))
        except ModelRefused as error:
            raise ExportError(f"the server would refuse the export: {error}") from error
        loaded.backend.close()


def measure_ap(model: ModelConfig, graph: bytes, data: CocoDataset) -> dict[str, float]:
    """AP and its kin of a graph, through the loader, engine and pipeline that serve it."""
    max_dets = model.postprocess.max_instances
    with _staged(model, graph) as folder:
        predictor = RepositoryPredictor(folder, model.version, max_dets=max_dets)
        results = predict(data, predictor, progress=True)
    numbers = mask_ap(data.annotation_file, results, max_dets=max_dets)
    return {name: round(value, 4) for name, value in numbers.items()}
