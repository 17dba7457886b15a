"""The service's code as benchmarks call it without its server: model, engine, steps of an image.

Benchmarks and the servers of the comparison import what is inside `service.work` and
`service.models` from here alone. Runs in the environments of the other servers too, so it imports
no more than they have.

    decode (bytes -> canvases) -> infer (one or more images) -> encode (JSON)
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort
import orjson

from pipeline.model_config import ModelConfig
from pipeline.postprocess import TileCandidates
from pipeline.preprocess import count_canvases
from pipeline.types import Tile
from service.engines.artefacts import ONNX_FILE as ONNX_FILE
from service.engines.base import BackendOptions
from service.models.repository import LoadedModel as LoadedModel
from service.models.repository import load_version, read_config
from service.work.image import ImageWork, count_cost, read_image_header
from service.work.request import ImageFile, Outcome, RequestOptions

MAX_BATCH = 8
"""Images, where a framework batches them; also the engine's most canvases at once."""
MAX_PIXELS = 50_000_000
MAX_CANVASES = 1_000_000
OPTIONS = RequestOptions()


def load_model(folder: Path, threads: int | None = 1, **options: Any) -> LoadedModel:
    """A model of a repository with its engine, on the CPU unless told otherwise.

    Args:
        folder: The model's.
        threads: Of one engine call on the CPU.
        **options: Of `BackendOptions`.
    """
    wanted = {"device": "cpu", "threads": threads, **options}
    return load_version(folder, options=BackendOptions(**wanted))


def read_model(folder: Path, version: int | None = None) -> tuple[ModelConfig, Path]:
    """The configuration of a model's version (None: the one that is served), and its folder."""
    config = read_config(folder, version)
    return config, folder / str(config.version)


def canvases_of(folder: Path, image_hw: tuple[int, int]) -> int:
    """Canvases of an image of [H, W] for the served version of a model."""
    return count_canvases(image_hw, read_model(folder)[0].input)


def open_session(graph: bytes | Path, threads: int) -> ort.InferenceSession:
    """ONNX Runtime on the CPU with nothing of ours around it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    source = graph if isinstance(graph, bytes) else str(graph)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class DecodedImage:
    """An image whose canvases have been created.

    Attributes:
        work: The service's state of it.
        tiles: All of its canvases.
    """

    work: ImageWork
    tiles: Sequence[Tile]


def decode(data: bytes, config: ModelConfig) -> DecodedImage:
    """An image's file to canvases."""
    image_hw = read_image_header(data, MAX_PIXELS).hw
    most = count_cost(image_hw, config.input, MAX_CANVASES)
    work = ImageWork(ImageFile(None, data), image_hw, most, config, OPTIONS)
    work.open()
    return DecodedImage(work, [work.make_canvas(index)[0] for index in range(work.canvases)])


def finish(image: DecodedImage, candidates: Iterable[TileCandidates]) -> Outcome:
    """Post-processes the canvases, merges their instances and encodes the answer."""
    began_s = time.monotonic()
    for index, (tile, found) in enumerate(zip(image.tiles, candidates, strict=True)):
        image.work.search(index, tile, found, (began_s, began_s), 1.0)
    return image.work.finish(began_s)


def segment(model: LoadedModel, body: bytes) -> int:
    """One image from its bytes to its answer in one thread; returns its number of instances."""
    image = decode(body, model.config)
    return finish(image, (model.backend.infer([tile])[0] for tile in image.tiles)).instances


class SharedEngine:
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
        return decode(data, self._model.config)

    def infer(self, images: Sequence[DecodedImage]) -> list[list[TileCandidates]]:
        """The candidates of each canvas of each image; canvases of one shape share calls."""
        found: list[list[TileCandidates]] = [[] for _ in images]
        by_shape: dict[tuple[int, ...], list[tuple[int, Tile]]] = defaultdict(list)
        for index, image in enumerate(images):
            for tile in image.tiles:
                by_shape[tile.image.shape].append((index, tile))
        for waiting in by_shape.values():
            for start in range(0, len(waiting), MAX_BATCH):
                batch = waiting[start : start + MAX_BATCH]
                answers = self._model.backend.infer([tile for _, tile in batch])
                for (index, _), candidates in zip(batch, answers, strict=True):
                    found[index].append(candidates)
        return found

    def encode(self, image: DecodedImage, candidates: Sequence[TileCandidates]) -> bytes:
        """An image's answer as our server writes it, without its times."""
        config, entry = self._model.config, finish(image, candidates).payload
        body = {"model": config.name, "version": self._model.version, "task": config.task}
        return orjson.dumps({**body, "results": [orjson.Fragment(entry)]})
