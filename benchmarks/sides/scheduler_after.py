"""The scheduling layer of this checkout: `Scheduler` and `WatchedEngine` around a stub engine.

    PYTHONPATH=CHECKOUT python -P benchmarks/sides/scheduler_after.py OPTIONS

Stand-alone: it imports `service` and `pipeline` of that checkout. `benchmarks scheduler` describes
OPTIONS and the lines.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from pipeline.model_config import Canvas
from pipeline.types import Candidates, Tile, Window
from service.engines.watch import WatchedEngine
from service.settings import Settings
from service.work.image import ImageWork
from service.work.policy import Policy
from service.work.queue import Job
from service.work.request import ClientProfile, ImageFile, Outcome, RequestOptions, RequestProgress
from service.work.scheduler import Scheduler


class AfterEngine:
    """Answers each call after `infer_s` with the same candidates for every canvas."""

    name, device, reason, precision, concurrency = "stub", "cpu", "benchmark", "fp32", 1

    def __init__(self, infer_s: float) -> None:
        self._infer_s = infer_s
        masks = np.zeros((1, 16, 16), np.float32)
        self._candidates = Candidates(np.ones(1, np.float32), np.zeros(1, np.int64), masks)

    def infer(self, tiles: Any) -> list[Any]:
        if self._infer_s:
            time.sleep(self._infer_s)
        return [self._candidates] * len(tiles)

    def close(self) -> None:
        pass


class AfterImage(ImageWork):
    """Canvases whose decoding and post-processing take no time."""

    def __init__(self, tile: Tile, canvases: int) -> None:
        no_config: Any = None
        super().__init__(ImageFile(None, b""), (64, 64), canvases, no_config, RequestOptions())
        self._tile = tile

    def open(self, canvases: Sequence[Canvas] = ()) -> None:
        pass

    def make_canvas(self, index: int) -> tuple[Tile, bool]:
        return self._tile, next(self._created) == self.canvases

    def search(self, *of_canvas: Any) -> None:
        pass

    def finish(self, began_s: float) -> Outcome:
        return Outcome(b"")


async def run(scheduler: Scheduler, tile: Tile, images: int, canvases: int, clients: int) -> None:
    """Requests of one image each, `clients` at a time."""
    left = iter(range(images))
    loop = asyncio.get_running_loop()

    async def run_client() -> None:
        for _ in left:
            image = AfterImage(tile, canvases)
            progress = RequestProgress(canvases=canvases)
            client = ClientProfile(name="benchmark")
            done = loop.create_future()
            await scheduler.run(Job(client=client, images=[image], progress=progress, done=done))
            assert image.outcome is not None and image.outcome.error is None

    await asyncio.gather(*(run_client() for _ in range(clients)))


async def main() -> None:
    """Entry point: answers lines until the end of standard input."""
    options = SimpleNamespace(**json.loads(sys.argv[1]))
    engine: Any = AfterEngine(options.infer_s)
    policy = Policy(
        threads=Settings().pool_threads + 1,
        batch=True,
        max_batch=options.max_batch,
        max_delay_s=options.max_delay_s,
    )
    watched = WatchedEngine(engine, probe=lambda backend: None, timeout_s=120)
    scheduler = Scheduler(watched, policy)
    tile = Tile(np.zeros((64, 64, 3), np.uint8), (64, 64), Window(0, 0, 64, 64))
    for line in sys.stdin:
        asked = json.loads(line)
        cpu, wall = time.process_time(), time.perf_counter()
        await run(scheduler, tile, asked["images"], asked["canvases"], options.clients)
        costs = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
        print(json.dumps({"images": asked["images"], **costs}), flush=True)
    await scheduler.drain()


if __name__ == "__main__":
    asyncio.run(main())
