"""The scheduling layer of commit 8104970: `Stages` and `DynamicBatcher` around a stub engine.

    PYTHONPATH=CHECKOUT python -P benchmarks/sides/scheduler_before.py OPTIONS

Stand-alone: it imports `service` of that checkout and nothing of this one. `benchmarks scheduler`
describes OPTIONS and the lines.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np

BATCHER, METRICS, STAGES, SETTINGS, TYPES = map(
    import_module,
    (
        *("service.batcher", "service.metrics", "service.stages", "service.settings"),
        "service.pipeline.types",
    ),
)
"""Of that checkout, so the names are those of its commit."""


class BeforeEngine:
    """Answers each call after `infer_s` with the same candidates for every canvas."""

    name, device, reason, precision, concurrency = "stub", "cpu", "benchmark", "fp32", 1

    def __init__(self, infer_s: float) -> None:
        self._infer_s = infer_s
        masks = np.zeros((1, 16, 16), np.float32)
        self._candidates = TYPES.Candidates(np.ones(1, np.float32), np.zeros(1, np.int64), masks)

    def infer(self, tiles: Any) -> list[Any]:
        if self._infer_s:
            time.sleep(self._infer_s)
        return [self._candidates] * len(tiles)

    def close(self) -> None:
        pass


class BeforeImage:
    """Canvases whose post-processing takes no time."""

    def __init__(self, tiles: list[Any]) -> None:
        self.tiles = tiles
        self.searched = 0

    def search(self, index: int, candidates: Any) -> bool:
        self.searched += 1
        return self.searched == len(self.tiles)


async def run(
    stages: Any, batcher: Any, tile: Any, images: int, canvases: int, clients: int
) -> None:
    """Clients that each hand over one image after another."""
    left = iter(range(images))
    tiles = [tile] * canvases

    async def run_client() -> None:
        for number in left:
            build = partial(lambda _: BeforeImage(tiles))
            carried = await stages._hand_over(lambda: None, build, batcher, float(number))
            assert carried.picture.searched == canvases

    await asyncio.gather(*(run_client() for _ in range(clients)))


async def main() -> None:
    """Entry point: answers lines until the end of standard input."""
    options = SimpleNamespace(**json.loads(sys.argv[1]))
    stages = STAGES.Stages(SETTINGS.Settings(), METRICS.Metrics())
    batcher = BATCHER.DynamicBatcher(
        BeforeEngine(options.infer_s), max_batch=options.max_batch, max_delay_s=options.max_delay_s
    )
    batcher.start()
    image = np.zeros((64, 64, 3), np.uint8)
    tile = TYPES.Tile(image, (64, 64), TYPES.Window(0, 0, 64, 64))
    for line in sys.stdin:
        asked = json.loads(line)
        cpu, wall = time.process_time(), time.perf_counter()
        await run(stages, batcher, tile, asked["images"], asked["canvases"], options.clients)
        costs = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
        print(json.dumps({"images": asked["images"], **costs}), flush=True)
    await batcher.drain()
    stages.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
