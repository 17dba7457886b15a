from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from pipeline.types import Candidates, Tile, Window
from service.engines.base import Precision, collate
from service.errors import Draining, EngineError
from service.work.batcher import BatchStats, DynamicBatcher

BAD = 250


class FakeBackend:
    """Answers each canvas with its own first pixel; fails on `BAD`; can be held."""

    name = "fake"
    device = "cpu"
    precision: Precision = "fp32"
    reason = "a test"

    def __init__(self, concurrency: int = 1) -> None:
        self.concurrency = concurrency
        self.batches: list[list[int]] = []
        self.shapes: list[tuple[int, ...]] = []
        self.go = threading.Event()
        self.go.set()
        self.entered = threading.Event()
        self.closed = False

    def infer(self, tiles: Sequence[Tile]) -> list[Candidates]:
        images, valid_hw = collate(tiles)
        self.entered.set()
        assert self.go.wait(10)
        values = [int(image[0, 0, 0]) for image in images]
        self.batches.append(values)
        self.shapes.append(images.shape)
        if BAD in values:
            raise RuntimeError("the engine does not like 250")
        return [
            Candidates(
                np.array([value], np.float32),
                np.array([hw[0]], np.int64),
                np.zeros((1, 1, 1), np.float32),
            )
            for value, hw in zip(values, valid_hw, strict=True)
        ]

    def close(self) -> None:
        self.closed = True


def build_tile(value: int, height: int = 4, width: int = 4) -> Tile:
    canvas = np.full((height, width, 3), value, np.uint8)
    return Tile(canvas, (height, width), Window(0, 0, height, width))


def start_batcher(
    backend: FakeBackend,
    *,
    max_batch: int = 4,
    max_delay_s: float = 0.01,
    on_batch: Callable[[BatchStats], None] = lambda stats: None,
) -> DynamicBatcher:
    batcher = DynamicBatcher(
        backend, max_batch=max_batch, max_delay_s=max_delay_s, on_batch=on_batch
    )
    batcher.start()
    return batcher


async def infer_one(batcher: DynamicBatcher, value: int, height: int = 4, width: int = 4) -> int:
    inferred = await batcher.infer([build_tile(value, height, width)])
    assert inferred.candidates[0].labels[0] == height
    return int(inferred.candidates[0].scores[0])


async def hold_engine(backend: FakeBackend, batcher: DynamicBatcher) -> asyncio.Task[int]:
    """Puts one canvas into the engine and keeps it there until `backend.go` is set."""
    backend.go.clear()
    task = asyncio.create_task(infer_one(batcher, 1))
    assert await asyncio.to_thread(backend.entered.wait, 10)
    return task


async def test_each_canvas_gets_its_own_result() -> None:
    backend = FakeBackend()
    batcher = start_batcher(backend)
    values = list(range(1, 18))
    assert await asyncio.gather(*(infer_one(batcher, value) for value in values)) == values
    assert sorted(v for batch in backend.batches for v in batch) == values
    await batcher.drain()


async def test_canvases_that_come_together_share_calls() -> None:
    backend = FakeBackend()
    stats: list[BatchStats] = []
    batcher = start_batcher(backend, max_delay_s=10, on_batch=stats.append)
    await asyncio.gather(*(infer_one(batcher, value) for value in range(8)))
    assert [s.size for s in stats] == [4, 4]
    assert not any(s.failed for s in stats)
    await batcher.drain()


async def test_a_lone_canvas_goes_after_the_delay() -> None:
    backend = FakeBackend()
    batcher = start_batcher(backend, max_batch=100, max_delay_s=0.001)
    assert await asyncio.wait_for(infer_one(batcher, 5), 10) == 5
    await batcher.drain()


async def test_shapes_never_mix_in_a_call() -> None:
    backend = FakeBackend()
    batcher = start_batcher(backend, max_batch=3)
    sizes = [(4, 4), (4, 8), (8, 4)] * 5
    found = await asyncio.gather(*(infer_one(batcher, i, *hw) for i, hw in enumerate(sizes)))
    assert found == list(range(15))
    assert {shape[1:3] for shape in backend.shapes} == set(sizes)
    assert max(shape[0] for shape in backend.shapes) == 3
    await batcher.drain()


async def test_a_rare_shape_is_not_starved_by_a_common_one() -> None:
    backend = FakeBackend()
    batcher = start_batcher(backend, max_batch=2, max_delay_s=0.0)
    held = await hold_engine(backend, batcher)
    rare = asyncio.create_task(infer_one(batcher, 2, 8, 8))
    await asyncio.sleep(0.002)
    common = [asyncio.create_task(infer_one(batcher, value)) for value in range(3, 9)]
    await asyncio.sleep(0)
    backend.go.set()
    await asyncio.gather(held, rare, *common)
    assert backend.batches[1] == [2]
    await batcher.drain()


async def test_tiles_of_one_image_come_back_in_order() -> None:
    backend = FakeBackend()
    batcher = start_batcher(backend, max_batch=4)
    inferred = await batcher.infer([build_tile(value) for value in range(1, 11)])
    assert [int(c.scores[0]) for c in inferred.candidates] == list(range(1, 11))
    assert [len(batch) for batch in backend.batches] == [4, 4, 2]
    assert len(inferred.calls) == 3
    assert all(start < end for start, end in inferred.calls)
    await batcher.drain()


async def test_a_bad_canvas_harms_only_itself() -> None:
    backend = FakeBackend()
    stats: list[BatchStats] = []
    batcher = start_batcher(backend, max_batch=8, max_delay_s=10, on_batch=stats.append)
    values = [1, 2, BAD, 4, 5, 6, 7, 8]
    found = await asyncio.gather(
        *(infer_one(batcher, value) for value in values), return_exceptions=True
    )
    assert isinstance(found[2], EngineError)
    assert [v for v in found if not isinstance(v, BaseException)] == [1, 2, 4, 5, 6, 7, 8]
    assert [(s.size, s.failed) for s in stats] == [(8, True)] + [
        (1, value == BAD) for value in values
    ]
    assert await asyncio.gather(*(infer_one(batcher, v) for v in range(8))) == list(range(8))
    await batcher.drain()


async def test_a_bad_tile_fails_its_image_and_removes_its_other_tiles() -> None:
    backend = FakeBackend()
    batcher = start_batcher(backend, max_batch=1)
    with pytest.raises(EngineError):
        await batcher.infer([build_tile(BAD), *(build_tile(v) for v in range(20))])
    assert batcher.waiting == 0
    await batcher.drain()
    assert len(backend.batches) <= 3


async def test_a_wrong_number_of_results_is_an_engine_error() -> None:
    class ShortBackend(FakeBackend):
        def infer(self, tiles: Sequence[Tile]) -> list[Candidates]:
            return super().infer(tiles)[:-1]

    batcher = start_batcher(ShortBackend())
    with pytest.raises(EngineError):
        await infer_one(batcher, 1)
    await batcher.drain()


async def test_cancelled_work_is_removed_and_never_runs() -> None:
    backend = FakeBackend()
    batcher = start_batcher(backend, max_batch=4)
    held = await hold_engine(backend, batcher)
    waiting = [asyncio.create_task(infer_one(batcher, value)) for value in range(2, 102)]
    await asyncio.sleep(0)
    assert batcher.waiting == 100
    for task in waiting[:90]:
        task.cancel()
    await asyncio.gather(*waiting[:90], return_exceptions=True)
    assert batcher.waiting == 10
    backend.go.set()
    assert await asyncio.gather(held, *waiting[90:]) == [1, *range(92, 102)]
    assert sum(map(len, backend.batches)) == 11
    await batcher.drain()


async def test_work_cancelled_in_the_engine_leaves_the_others_alone() -> None:
    backend = FakeBackend()
    batcher = start_batcher(backend, max_batch=2, max_delay_s=10)
    backend.go.clear()
    tasks = [asyncio.create_task(infer_one(batcher, value)) for value in (1, 2)]
    assert await asyncio.to_thread(backend.entered.wait, 10)
    tasks[0].cancel()
    backend.go.set()
    assert await tasks[1] == 2
    await asyncio.wait(tasks)
    assert tasks[0].cancelled()
    await batcher.drain()


async def test_drain_runs_what_waits_and_takes_nothing_more() -> None:
    backend = FakeBackend()
    batcher = start_batcher(backend, max_batch=100, max_delay_s=1000)
    waiting = [asyncio.create_task(infer_one(batcher, value)) for value in range(5)]
    await asyncio.sleep(0)
    await asyncio.wait_for(batcher.drain(), 10)
    assert await asyncio.gather(*waiting) == list(range(5))
    with pytest.raises(Draining):
        await infer_one(batcher, 1)


async def test_abort_answers_all_who_wait() -> None:
    backend = FakeBackend()
    batcher = start_batcher(backend)
    held = await hold_engine(backend, batcher)
    waiting = [asyncio.create_task(infer_one(batcher, value, 8, 8)) for value in range(5)]
    await asyncio.sleep(0)
    await batcher.abort()
    found = await asyncio.gather(held, *waiting, return_exceptions=True)
    assert all(isinstance(error, Draining) for error in found)
    backend.go.set()


@pytest.mark.parametrize(("max_batch", "max_delay_s"), [(0, 1.0), (-1, 1.0), (1, -0.1)])
def test_bounds_that_make_no_sense_are_refused(max_batch: int, max_delay_s: float) -> None:
    async def build() -> None:
        DynamicBatcher(FakeBackend(), max_batch=max_batch, max_delay_s=max_delay_s)

    with pytest.raises(ValueError, match=f"{max_batch}"):
        asyncio.run(build())


async def test_an_engine_that_takes_two_batches_gets_two() -> None:
    backend = FakeBackend(concurrency=2)
    batcher = start_batcher(backend, max_batch=1, max_delay_s=0.0)
    backend.go.clear()
    tasks = [asyncio.create_task(infer_one(batcher, value)) for value in range(1, 6)]
    async with asyncio.timeout(10):
        while batcher.waiting > 3:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
    assert batcher.waiting == 3
    backend.go.set()
    assert await asyncio.gather(*tasks) == [1, 2, 3, 4, 5]
    await batcher.drain()


async def test_draining_waits_for_every_batch_in_the_engine() -> None:
    backend = FakeBackend(concurrency=3)
    batcher = start_batcher(backend, max_batch=1, max_delay_s=0.0)
    backend.go.clear()
    tasks = [asyncio.create_task(infer_one(batcher, value)) for value in range(1, 4)]
    while batcher.waiting or not backend.entered.is_set():
        await asyncio.sleep(0)
    drained = asyncio.create_task(batcher.drain())
    await asyncio.sleep(0.01)
    assert not drained.done()
    backend.go.set()
    await drained
    assert [task.result() for task in tasks] == [1, 2, 3]


async def test_lower_ranks_go_first_and_equal_ranks_in_order() -> None:
    backend = FakeBackend()
    batcher = start_batcher(backend, max_batch=2, max_delay_s=0.0)
    held = await hold_engine(backend, batcher)
    tiles = [(10, 2.0), (11, 2.0), (12, 1.0), (13, 3.0), (14, 1.0)]
    tasks = [asyncio.create_task(batcher.infer([build_tile(v)], rank)) for v, rank in tiles]
    await asyncio.sleep(0)
    backend.go.set()
    await asyncio.gather(held, *tasks)
    assert backend.batches[1:] == [[12, 14], [10, 11], [13]]
    await batcher.drain()


async def test_a_bucket_of_lower_rank_goes_before_an_older_one() -> None:
    backend = FakeBackend()
    batcher = start_batcher(backend, max_batch=4, max_delay_s=0.0)
    held = await hold_engine(backend, batcher)
    old = asyncio.create_task(batcher.infer([build_tile(2, 8, 8)], 5.0))
    await asyncio.sleep(0.002)
    new = asyncio.create_task(batcher.infer([build_tile(3)], 4.0))
    await asyncio.sleep(0)
    backend.go.set()
    await asyncio.gather(held, old, new)
    assert backend.batches[1:] == [[3], [2]]
    await batcher.drain()
