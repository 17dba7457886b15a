from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from functools import partial

import pytest

from pipeline.postprocess import TileCandidates
from pipeline.types import Candidates, Prepared, Tile
from service.engines.base import BackendError
from service.errors import Draining, EngineError
from service.engines.watch import RestartingBackend
from service.work.batcher import BatchStats
from service.work.lanes import Carried, Lanes
from service.work.steps import DecodedImage, Options, TiledImage
from tests.service.engines.test_ort_options import read_config
from tests.service.work.test_batcher import BAD, FakeBackend, build_tile

CONFIG = read_config()


class Picture(TiledImage):
    """An image whose answer is that all of its tiles were searched."""

    def search(self, index: int, candidates: TileCandidates) -> bool:
        assert candidates.scores[0] == self.tiles[index].image[0, 0, 0]
        self.searched.append((0.0, 0.0))
        return len(self.searched) == len(self.tiles)


class House:
    """Lanes with their engine."""

    def __init__(self, lanes: int = 1, timeout_s: float = 10.0, images: int | None = None) -> None:
        self.backend = FakeBackend(lanes)
        self.others: list[FakeBackend] = []
        self.stats: list[BatchStats] = []
        self.engine = RestartingBackend(
            self.backend, self.build, lambda backend: None, timeout_s=timeout_s
        )
        self.lanes = Lanes(self.engine, images=images, on_call=self.stats.append)
        self.began: list[int] = []

    def build(self) -> FakeBackend:
        self.others.append(FakeBackend(self.backend.concurrency))
        return self.others[-1]

    def decode(self, values: tuple[int, ...]) -> DecodedImage:
        self.began.append(values[0])
        if not all(values):
            raise ValueError("0 is no picture")
        tiles = tuple(build_tile(value) for value in values)
        return DecodedImage(Prepared((4, 4), tiles), None)

    async def carry(self, *values: int, rank: float = 0.0) -> Carried:
        build = partial(Picture, None, config=CONFIG, options=Options())
        return await self.lanes.carry(partial(self.decode, values), build, rank)

    def start(self, *values: int, rank: float = 0.0) -> asyncio.Task[Carried]:
        return asyncio.create_task(self.carry(*values, rank=rank))

    async def hold(self) -> list[asyncio.Task[Carried]]:
        """Puts an image into every lane and keeps them there until `backend.go` is set."""
        self.backend.go.clear()
        held = [self.start(1) for _ in range(self.backend.concurrency)]
        async with asyncio.timeout(10):
            while len(self.began) < len(held) or not self.backend.entered.is_set():
                await asyncio.sleep(0.001)
        return held


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    yield house
    house.backend.go.set()
    house.engine.close()


async def test_an_image_is_carried_by_one_thread(house: House) -> None:
    threads: list[threading.Thread] = []
    infer, decode = house.backend.infer, house.decode

    def watch_infer(tiles: Sequence[Tile]) -> list[Candidates]:
        threads.append(threading.current_thread())
        return infer(tiles)

    def watch_decode(values: tuple[int, ...]) -> DecodedImage:
        threads.append(threading.current_thread())
        return decode(values)

    house.backend.infer = watch_infer  # type: ignore[method-assign]
    house.decode = watch_decode  # type: ignore[method-assign]
    carried = await house.carry(7)
    assert len(threads) == 2 and threads[0] is threads[1]
    assert threads[0].name == "lane_0"
    assert house.backend.batches == [[7]]
    (call,) = carried.calls
    assert carried.decoded[0] <= carried.decoded[1] <= call[0] <= call[1]
    assert [(stats.size, stats.failed) for stats in house.stats] == [(1, False)]


@pytest.mark.parametrize(("lanes", "images"), [(1, 1), (2, 2), (3, 3), (3, 1), (1, 9)])
async def test_every_tile_of_an_image_is_searched_once(lanes: int, images: int) -> None:
    house = House(lanes, images=images)
    carried = await asyncio.gather(*(house.carry(*range(1, 1 + n)) for n in (1, 2, 7, 30, 1)))
    assert [len(image.picture.searched) for image in carried] == [1, 2, 7, 30, 1]
    assert [len(image.calls) for image in carried] == [1, 2, 7, 30, 1]
    values = sorted(value for batch in house.backend.batches for value in batch)
    assert values == sorted(v for n in (1, 2, 7, 30, 1) for v in range(1, 1 + n))
    await house.lanes.drain()
    house.engine.close()


@pytest.mark.parametrize("images", [1, 2])
async def test_a_free_lane_takes_tiles_of_an_image_that_has_some(images: int) -> None:
    house = House(lanes=2, images=images)
    together = threading.Barrier(2, timeout=10)
    infer = house.backend.infer

    def infer_together(tiles: Sequence[Tile]) -> list[Candidates]:
        together.wait()
        return infer(tiles)

    house.backend.infer = infer_together  # type: ignore[method-assign]
    assert len((await house.carry(1, 2, 3, 4)).calls) == 4  # never one alone
    house.engine.close()


async def test_a_lane_that_only_helps_begins_no_image() -> None:
    house = House(lanes=2, images=1)
    house.backend.go.clear()
    images = [house.start(1), house.start(2)]
    assert await asyncio.to_thread(house.backend.entered.wait, 10)
    await asyncio.sleep(0.02)
    assert (house.began, house.lanes.waiting) == ([1], 1)
    house.backend.go.set()
    await asyncio.gather(*images)
    house.engine.close()


async def test_images_go_by_rank_and_then_by_arrival(house: House) -> None:
    held = await house.hold()
    late = [house.start(v, rank=r) for v, r in ((10, 2), (11, 2), (12, 1), (13, 3), (14, 1))]
    await asyncio.sleep(0)
    assert house.lanes.waiting == 5
    house.backend.go.set()
    await asyncio.gather(*held, *late)
    assert house.began == [1, 12, 14, 10, 11, 13]
    assert house.lanes.waiting == 0


async def test_an_image_that_is_left_while_it_waits_is_never_begun(house: House) -> None:
    held = await house.hold()
    left, stays = house.start(2), house.start(3)
    await asyncio.sleep(0)
    left.cancel()
    await asyncio.sleep(0)
    house.backend.go.set()
    await asyncio.gather(*held, stays)
    assert house.began == [1, 3]
    assert left.cancelled()


async def test_tiles_of_an_image_that_is_left_are_not_begun(house: House) -> None:
    house.backend.go.clear()
    left = house.start(1, 2, 3, 4)
    assert await asyncio.to_thread(house.backend.entered.wait, 10)
    left.cancel()
    await asyncio.sleep(0)
    house.backend.go.set()
    await house.carry(9)
    assert house.backend.batches == [[1], [9]]


async def test_what_fails_is_one_images_error_alone(house: House) -> None:
    bad, empty, good = await asyncio.gather(
        house.carry(5, BAD, 6), house.carry(0), house.carry(7), return_exceptions=True
    )
    assert isinstance(bad, EngineError) and isinstance(empty, ValueError)
    assert isinstance(good, Carried)
    assert [stats.failed for stats in house.stats] == [False, True, False]
    assert [6] not in house.backend.batches  # nobody would have seen it


async def test_a_result_too_many_is_an_error(house: House) -> None:
    infer = house.backend.infer
    house.backend.infer = lambda tiles: infer(tiles) * 2  # type: ignore[method-assign]
    with pytest.raises(EngineError):
        await house.carry(7)
    assert house.stats[0].failed


@pytest.mark.parametrize("lanes", [1, 2])
async def test_a_lane_that_hangs_costs_its_image_and_another_takes_its_place(lanes: int) -> None:
    house = House(lanes, timeout_s=0.05, images=1)  # of two the other hangs on the other tile
    house.backend.go.clear()
    hung, waits = house.start(1, 2), house.start(3)
    with pytest.raises(EngineError):
        await hung
    assert len((await waits).calls) == 1
    assert house.others[0].batches == [[3]]
    assert [stats.failed for stats in house.stats] == [True] * lanes + [False]
    house.backend.go.set()  # the threads come back, and are of no use
    assert len((await house.carry(4)).calls) == 1
    assert [stats.failed for stats in house.stats] == [True] * lanes + [False, False]
    house.engine.close()


async def test_draining_finishes_what_there_is_and_takes_nothing_more(house: House) -> None:
    held = await house.hold()
    waits = house.start(2)
    await asyncio.sleep(0)
    drained = asyncio.create_task(house.lanes.drain())
    await asyncio.sleep(0.01)
    assert not drained.done()
    with pytest.raises(Draining):
        await house.carry(3)
    house.backend.go.set()
    await drained
    assert all(len(task.result().calls) == 1 for task in (*held, waits))


async def test_a_drain_that_is_given_up_leaves_the_images_to_abort(house: House) -> None:
    held = await house.hold()
    waits = house.start(2)
    await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(house.lanes.drain(), 0.01)
    assert not any(task.done() for task in (*held, waits))
    await house.lanes.abort()
    for task in (*held, waits):
        with pytest.raises(Draining):
            await task
    with pytest.raises(Draining):
        await house.carry(3)


async def test_closing_the_engine_ends_the_waiting() -> None:
    house = House()
    (held,) = await house.hold()
    house.engine.close()
    with pytest.raises(EngineError):
        await held
    house.backend.go.set()
    with pytest.raises(BackendError):
        house.engine.infer([build_tile(1)])
