"""The model as every other server of the comparison uses it: our steps, our engine, our answer.

    decode (bytes -> canvases) -> infer (one or more images) -> encode (JSON)

What the servers differ in is the rest: HTTP, queues, batches, threads and processes. The process
that starts a server tells it by variables what to serve, where, and on how many cores.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import orjson

from pipeline.postprocess import TileCandidates
from pipeline.types import Tile
from service.engines.base import BackendOptions
from service.models.repository import load_version
from service.work.steps import DecodedImage, Options, decode, find_in_tile, finish

MODEL, HOST, PORT, CORES = "SERVING_MODEL", "127.0.0.1", "SERVING_PORT", "SERVING_CORES"
MAX_BATCH = 8
"""Images, where a framework batches them; also the engine's most canvases at once."""
MAX_PIXELS = 50_000_000
OPTIONS = Options()
JSON = "application/json"


def read_port() -> int:
    """Where to listen."""
    return int(os.environ[PORT])


def read_cores() -> int:
    """Cores that the server may use, all its processes and threads together."""
    return int(os.environ[CORES])


class Model:
    """A model with its engine; every method may be called by several threads.

    Args:
        threads: Of one engine call.
    """

    def __init__(self, threads: int) -> None:
        folder = Path(os.environ[MODEL])
        self._model = load_version(folder, options=BackendOptions(device="cpu", threads=threads))

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
        """An image's answer as our server writes it, but for the times of its stages."""
        config, image_hw = self._model.config, image.prepared.image_hw
        found = [
            find_in_tile(tile, of_tile, image_hw, config, OPTIONS)
            for tile, of_tile in zip(image.prepared.tiles, candidates, strict=True)
        ]
        body = {
            "model": config.name,
            "version": self._model.version,
            "task": config.task,
            "results": [orjson.Fragment(finish(None, image, found, config, OPTIONS).payload)],
        }
        return orjson.dumps(body)
