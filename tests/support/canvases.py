"""Images of known canvases, and an engine that says which of them it was given."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence

import numpy as np

from pipeline.model_config import ModelConfig
from pipeline.repository_config import parse_model_config
from pipeline.types import Candidates, Tile, UInt8
from service.engines.base import Precision, collate
from service.work.image import ImageWork
from service.work.queue import Job
from service.work.request import ClientProfile, ImageFile, Priority, RequestOptions, RequestProgress
from tests.support.blob_model import build_graph, model_config

SIDE = 4
BAD = 250
"""`FakeEngine` fails on a canvas of this value."""


def build_config(height: int = SIDE, width: int = SIDE) -> ModelConfig:
    """A model whose canvases are tiles of the image, not enlarged, without overlap."""
    tiles = {"rule": "tile", "scale": 1.0, "tile_hw": [height, width], "overlap_px": 0}
    content = {**model_config(build_graph()), "input": {"resize": tiles}, "mask_stride": 4}
    return parse_model_config(json.dumps(content)).for_version(1)


CONFIG = build_config()


class FakeEngine:
    """Answers without instances, fails on `BAD`; can be held.

    Attributes:
        batches: The first pixel of every canvas of every call.
        go: Calls wait for it.
    """

    name = "fake"
    device = "cpu"
    precision: Precision = "fp32"
    reason = "a test"

    def __init__(self, concurrency: int = 1) -> None:
        self.concurrency = concurrency
        self.batches: list[list[int]] = []
        self.shapes: list[tuple[int, ...]] = []
        self.threads: list[threading.Thread] = []
        self.go = threading.Event()
        self.go.set()
        self.entered = threading.Event()
        self.closed = False

    def infer(self, tiles: Sequence[Tile]) -> list[Candidates]:
        images, _ = collate(tiles)
        values = [int(image[0, 0, 0]) for image in images]
        self.batches.append(values)
        self.shapes.append(images.shape)
        self.threads.append(threading.current_thread())
        self.entered.set()
        assert self.go.wait(20)
        if BAD in values:
            raise RuntimeError("the engine does not like 250")
        height, width = (side // 4 for side in images.shape[1:3])
        empty = np.zeros(0, np.float32)
        none = Candidates(empty, np.zeros(0, np.int64), np.zeros((0, height, width), np.float32))
        return [none] * len(values)

    def close(self) -> None:
        self.closed = True

    @property
    def values(self) -> list[int]:
        """All canvases that it was given."""
        return [value for batch in self.batches for value in batch]


def draw(*values: int, side: tuple[int, int] = (SIDE, SIDE)) -> UInt8:
    """[h, n w, 3]: an image of one canvas for each value."""
    return np.concatenate([np.full((*side, 3), value, np.uint8) for value in values], axis=1)


def build_work(*values: int, config: ModelConfig = CONFIG, overlay: bool = False) -> ImageWork:
    """The work of an image with a canvas for each value."""
    height, width = config.input.resize.tile_hw  # type: ignore[union-attr]
    image = draw(*values, side=(height, width))
    hw = image.shape[0], image.shape[1]
    file = ImageFile(None, image)
    return ImageWork(file, hw, len(values), config, RequestOptions(overlay=overlay, masks="none"))


def build_job(
    *images: ImageWork, client: str | ClientProfile = "someone", priority: Priority = "interactive"
) -> Job:
    """A request of these images; needs a running event loop."""
    return Job(
        client=client if isinstance(client, ClientProfile) else ClientProfile(name=client),
        images=images,
        priority=priority,
        progress=RequestProgress(canvases=sum(image.canvases for image in images)),
        done=asyncio.get_running_loop().create_future(),
    )
