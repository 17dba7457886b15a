"""The service's code as benchmarks call it without its server: model, engine, steps of an image.

Benchmarks and the servers of the comparison import what is inside `service.work` and
`service.models` from here alone. Runs in the environments of the other servers too, so it imports
no more than they have.

    decode (bytes -> canvases) -> infer (one or more images) -> encode (JSON)
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import onnxruntime as ort
import orjson

from pipeline.model_config import ModelConfig, TileResize
from pipeline.postprocess import TileCandidates
from pipeline.preprocess import tile_starts
from pipeline.types import Tile
from service.engines.base import BackendOptions
from service.engines.onnxruntime import OrtBackend, build_ort_backend
from service.models.artefacts import ONNX_FILE as ONNX_FILE
from service.models.repository import LoadedModel as LoadedModel
from service.models.repository import load_version, read_config
from service.work.steps import DecodedImage as DecodedImage
from service.work.steps import Options, TiledImage, decode, find_in_tile, finish

MAX_BATCH = 8
"""Images, where a framework batches them; also the engine's most canvases at once."""
MAX_PIXELS = 50_000_000
OPTIONS = Options()


def load_model(folder: Path, threads: int = 1, slots: int | None = None) -> LoadedModel:
    """A model of a repository with its CPU engine.

    Args:
        folder: The model's.
        threads: Of one engine call.
        slots: Engine calls at once; None for the default.
    """
    return load_version(folder, options=BackendOptions(device="cpu", threads=threads, slots=slots))


def read_model(folder: Path, version: int | None = None) -> tuple[ModelConfig, Path]:
    """The configuration of a model's version (None: the one that is served), and its folder."""
    config = read_config(folder, version)
    return config, folder / str(config.version)


def count_canvases(folder: Path, image_hw: tuple[int, int]) -> int:
    """Canvases of an image of [H, W] for the served version of a model."""
    resize = read_model(folder)[0].input.resize
    if not isinstance(resize, TileResize):
        return 1
    sides = zip(image_hw, resize.tile_hw, strict=True)
    return math.prod(len(tile_starts(side, tile, resize.overlap_px)) for side, tile in sides)


def build_engine(graph: bytes, threads: int) -> OrtBackend:
    """The service's CPU engine of a graph."""
    return build_ort_backend(graph, BackendOptions(device="cpu", threads=threads))


def open_session(graph: bytes | Path, threads: int) -> ort.InferenceSession:
    """ONNX Runtime on the CPU with nothing of ours around it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    source = graph if isinstance(graph, bytes) else str(graph)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def segment(model: LoadedModel, body: bytes) -> int:
    """One image from its bytes to its answer in one thread; returns its number of instances."""
    decoded = decode(body, model.config, MAX_PIXELS, OPTIONS)
    image = TiledImage(None, decoded, model.config, OPTIONS)
    for index, tile in enumerate(image.tiles):
        (candidates,) = model.backend.infer([tile])
        image.search(index, candidates)
    assert image.answer is not None
    return image.answer.instances


class Engine:
    """A model as every other server of the comparison uses it: our steps, engine and answer.

    What the servers differ in is the rest: HTTP, queues, batches, threads, processes. Every method
    may be called by several threads.

    Args:
        folder: The model's.
        threads: Of one engine call.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        self._model = load_model(folder, threads)

    def decode(self, data: bytes) -> DecodedImage:
        """An image's file to canvases."""
        return decode(data, self._model.config, MAX_PIXELS, OPTIONS)

    def infer(self, images: Sequence[DecodedImage]) -> list[list[TileCandidates]]:
        """The candidates of each canvas of each image; canvases of one shape share calls."""
        found: list[list[TileCandidates]] = [[] for _ in images]
        by_shape: dict[tuple[int, ...], list[tuple[int, Tile]]] = defaultdict(list)
        for index, image in enumerate(images):
            for tile in image.prepared.tiles:
                by_shape[tile.image.shape].append((index, tile))
        for waiting in by_shape.values():
            for start in range(0, len(waiting), MAX_BATCH):
                batch = waiting[start : start + MAX_BATCH]
                answers = self._model.backend.infer([tile for _, tile in batch])
                for (index, _), candidates in zip(batch, answers, strict=True):
                    found[index].append(candidates)
        return found

    def encode(self, image: DecodedImage, candidates: Sequence[TileCandidates]) -> bytes:
        """An image's answer as our server writes it, without the times of its stages."""
        config, image_hw = self._model.config, image.prepared.image_hw
        found = [
            find_in_tile(tile, of_tile, image_hw, config, OPTIONS)
            for tile, of_tile in zip(image.prepared.tiles, candidates, strict=True)
        ]
        entry = finish(None, image, found, config, OPTIONS).payload
        body = {"model": config.name, "version": self._model.version, "task": config.task}
        return orjson.dumps({**body, "results": [orjson.Fragment(entry)]})
