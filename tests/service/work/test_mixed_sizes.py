"""Images of many sizes on a GPU: the real scheduler and slots, an engine on a fake CUDA.

The GPU is the bottleneck: a call takes its time, and ends only when the other threads have nothing
left to do, so that the machine's load does not matter.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import pytest

from pipeline.canvases import choose_canvases, list_canvases
from pipeline.model_config import Canvas, ModelConfig
from pipeline.postprocess import TileCandidates
from pipeline.types import Tile, UInt8
from service.engines.device_slot import DeviceSlot, build_device_slots, list_shapes
from service.engines.slots import SlotBackend
from service.engines.watch import WatchedEngine
from service.settings import Settings
from service.work.image import ImageWork
from service.work.policy import Policy, choose_policy
from service.work.request import ImageFile, RequestOptions
from service.work.scheduler import CallStats, Scheduler
from tests.service.engines.test_ort_session import read_config
from tests.support.canvases import build_job
from tests.support.device_slots import Rig
from tests.support.fake_cuda import FakeCuda

CLIENTS = 128
IMAGES = 8
"""Of each client, one after the other."""
SIZES = {(480, 640): 25, (427, 640): 23, (640, 480): 8, (640, 427): 6, (375, 500): 6, (333, 500): 4}
"""Height and width of photographs, and how many of 100 have them; the others have any ratio."""
SOLO_512 = {"rule": "keep_ratio", "short_side": 64, "long_side": 107, "pad_multiple": 4}
"""That of SOLO-512 at an eighth of its scale: as many canvases, with a 64th of the pixels."""


def read_model(*, listed: bool) -> ModelConfig:
    config = read_config(input={"resize": SOLO_512}, limits={"max_batch": 16})
    canvases = choose_canvases(config.input) if listed else ()
    return config.model_copy(update={"canvases": canvases})


def draw_sizes(seed: int) -> Iterator[tuple[int, int]]:
    rng = random.Random(seed)
    while True:
        if rng.random() * 100 < sum(SIZES.values()):
            yield rng.choices(list(SIZES), list(SIZES.values()))[0]
        else:
            sides = round(rng.triangular(330, 640, 430)), 640
            yield sides if rng.random() < 0.75 else sides[::-1]


@cache
def black(hw: tuple[int, int]) -> UInt8:
    return np.zeros((*hw, 3), np.uint8)


class Gpu(SlotBackend):
    """Slots on a fake GPU, which computes one batch at a time.

    Attributes:
        scheduler: Set by its owner.
        shapes: Of every batch.
        loaded: Sizes of those that were taken while every client had an image in flight.
    """

    scheduler: Scheduler

    def __init__(self, cuda: FakeCuda, config: ModelConfig) -> None:
        self.rigs: list[Rig] = []
        self.shapes: list[tuple[int, Canvas]] = []
        self.loaded: list[int] = []
        self._computing = threading.Lock()

        def build_slot() -> DeviceSlot:
            rig = Rig(cuda, canvases=list_shapes(config), max_batch=config.limits.max_batch)
            self.rigs.append(rig)
            return rig.slot

        slots, self.has_graphs = build_device_slots(2, build_slot, config, threads=False)
        options = {"device": "cuda", "precision": "fp32", "reason": "a test", "max_batch": 16}
        super().__init__(slots, name="fake", **options)  # type: ignore[arg-type]

    def infer(self, tiles: Sequence[Tile]) -> Sequence[TileCandidates]:
        height, width = tiles[0].image.shape[:2]
        self.shapes.append((len(tiles), (height, width)))
        if self.scheduler.waiting >= CLIENTS - 2 * 16:  # but for those of the other call
            self.loaded.append(len(tiles))
        found = super().infer(tiles)
        deadline_s = time.monotonic() + 10
        with self._computing:
            time.sleep(0.002 + 0.0002 * len(tiles))
        while self._others_are_busy():
            assert time.monotonic() < deadline_s
            time.sleep(0.0005)
        return found

    def _others_are_busy(self) -> bool:
        with self.scheduler._lock:
            crew, batches = self.scheduler._threads, self.scheduler._batches
            return len(crew._threads) - len(crew._idle) > batches.calls


async def serve(gpu: Gpu, policy: Policy, config: ModelConfig) -> list[CallStats]:
    """128 clients, each of which sends its next image after the answer to the last one."""
    stats: list[CallStats] = []
    watched = WatchedEngine(gpu, lambda backend: None, timeout_s=60)
    gpu.scheduler = Scheduler(watched, policy, on_call=stats.append)

    async def send(client: int) -> None:
        for _, hw in zip(range(IMAGES), draw_sizes(client), strict=False):
            file = ImageFile(None, black(hw))
            work = ImageWork(file, hw, 1, config, RequestOptions(overlay=False, masks="none"))
            job = build_job(work, client=str(client))
            await gpu.scheduler.run(job)
            assert work.outcome is not None and work.outcome.error is None

    try:
        await asyncio.wait_for(asyncio.gather(*map(send, range(CLIENTS))), 60)
    finally:
        await gpu.scheduler.abort()
        watched.close()
    return stats


@pytest.mark.parametrize("listed", [True, False])
async def test_batches_are_full_and_no_graph_is_recorded_under_load(
    fake_cuda: FakeCuda, listed: bool
) -> None:
    config = read_model(listed=listed)
    gpu = Gpu(fake_cuda, config)
    recorded, warm = len(fake_cuda.graphs), [list(rig.call.bound) for rig in gpu.rigs]
    assert recorded == (2 * 4 * 7 if listed else 0)
    watched = WatchedEngine(gpu, lambda backend: None, timeout_s=60)
    settings = Settings(max_batch=16, pool_threads=4, device="auto")
    policy = choose_policy(settings, watched, config)
    assert policy.calls == 2 and policy.max_batch == 16 and policy.canvases == config.canvases

    stats = await serve(gpu, policy, config)

    sizes = [size for size, _ in gpu.shapes]
    assert sum(sizes) == CLIENTS * IMAGES and not any(call.failed for call in stats)
    assert len(fake_cuda.graphs) == recorded, "a graph was recorded in the path of a request"
    assert len(gpu.loaded) > 20
    mean = sum(gpu.loaded) / len(gpu.loaded)
    shapes = {canvas for _, canvas in gpu.shapes}
    padding = sum(s.padding_px for s in stats) / sum(s.shown_px + s.padding_px for s in stats)
    if listed:
        assert [rig.call.bound for rig in gpu.rigs] == warm, "a shape ran without its graph"
        assert shapes <= set(config.canvases)
        assert mean >= 12, f"{mean:.1f} of 16 canvases in a batch"
        assert padding < 0.08
    else:
        assert len(shapes) > 7 and shapes <= set(list_canvases(config.input))
        assert mean < 10, "the test would pass without the list"
        assert padding < 0.03
