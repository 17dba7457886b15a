from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest

from pipeline.types import Candidates, Tile, Window
from service.engines.base import Backend, BackendError, Precision
from service.engines.watch import EngineHung, RestartingBackend
from tests.support.waiting import poll_until

GOOD, BAD, DEADLY, HANGING = 1, 2, 3, 4


class FakeEngine:
    """Fails on `BAD`, dies of `DEADLY`, does not come back from `HANGING` until released."""

    name = "fake"
    device = "cpu"
    precision: Precision = "fp32"
    reason = "a test"

    def __init__(self, number: int = 0, concurrency: int = 1) -> None:
        self.number = number
        self.concurrency = concurrency
        self.dead = self.closed = False
        self.calls: list[int] = []
        self.release = threading.Event()

    def infer(self, tiles: Sequence[Tile]) -> list[Candidates]:
        values = [int(tile.image[0, 0, 0]) for tile in tiles]
        self.calls += values
        if DEADLY in values:
            self.dead = True
        if self.dead:
            raise MemoryError("bad allocation")
        if HANGING in values:
            self.release.wait(20)
        if BAD in values:
            raise ValueError("2 is not liked")
        empty = np.zeros(0, np.float32)
        labels = np.zeros(0, np.int64)
        return [Candidates(empty, labels, np.full((0, self.number, 1), 0, np.float32))] * len(tiles)

    def close(self) -> None:
        self.closed = True


def build_tile(value: int) -> Tile:
    return Tile(np.full((2, 2, 3), value, np.uint8), (2, 2), Window(0, 0, 2, 2))


def probe(backend: Backend) -> None:
    backend.infer([build_tile(GOOD)])


class House:
    """A watched engine with the engines that were built for it."""

    def __init__(self, *, failures: int = 0, concurrency: int = 1, timeout_s: float = 10.0) -> None:
        self.engines = [FakeEngine(concurrency=concurrency)]
        self.failures = failures
        self.told: list[bool] = []
        self.building = threading.Event()
        self.may_build = threading.Event()
        self.may_build.set()
        self.backend = RestartingBackend(
            self.engines[0],
            self.build,
            probe,
            timeout_s=timeout_s,
            on_restart=self.told.append,
            first_pause_s=0.001,
        )

    def build(self) -> Backend:
        self.building.set()
        assert self.may_build.wait(20)
        if self.failures:
            self.failures -= 1
            raise OSError("no memory yet")
        self.engines.append(FakeEngine(len(self.engines)))
        return self.engines[-1]

    def infer(self, *values: int) -> int:
        """Number of the engine that answered."""
        results = self.backend.infer([build_tile(value) for value in values])
        assert len(results) == len(values)
        return results[0].mask_hw[0]


@contextmanager
def open_house(**options: int | float) -> Iterator[House]:
    house = House(**options)  # type: ignore[arg-type]
    try:
        yield house
    finally:
        house.may_build.set()
        for engine in house.engines:
            engine.release.set()
        house.backend.close()


wait_for = partial(poll_until, timeout_s=10, pause_s=0.001)


def test_a_healthy_engine_is_passed_through() -> None:
    with open_house() as house:
        assert house.infer(GOOD, GOOD) == 0
        described = house.backend.name, house.backend.device, house.backend.concurrency
        assert described == ("fake", "cpu", 1)
        assert house.backend.is_alive and house.told == []


def test_an_image_that_the_engine_does_not_like_is_not_the_engines_death() -> None:
    with open_house() as house:
        with pytest.raises(ValueError, match="2 is not liked"):
            house.infer(BAD)
        assert house.infer(GOOD) == 0
        assert house.told == [] and len(house.engines) == 1


def test_a_dead_engine_is_replaced_and_the_call_is_made_again() -> None:
    with open_house() as house:
        house.engines[0].dead = True
        assert house.infer(GOOD) == 1
        assert house.told == [False, True]
        assert house.engines[0].closed


def test_what_kills_two_engines_is_given_up_and_the_next_is_built() -> None:
    with open_house() as house:
        with pytest.raises(MemoryError):
            house.infer(DEADLY)
        assert house.engines[1].calls == [DEADLY]
        assert house.infer(GOOD) == 2


def test_building_is_tried_until_it_succeeds_and_calls_wait() -> None:
    with open_house(failures=4) as house:
        house.engines[0].dead = True
        assert house.infer(GOOD) == 1
        assert house.failures == 0


def test_a_call_that_hangs_is_given_up_and_another_engine_built() -> None:
    with open_house(timeout_s=0.05) as house:
        with pytest.raises(EngineHung, match=r"not come back after 0\.05 s"):
            house.infer(HANGING)
        assert house.infer(GOOD) == 1
        assert not house.engines[0].closed  # its thread may still be in there
        assert house.told == [False, True]


def test_calls_wait_while_an_engine_is_built() -> None:
    with open_house() as house, ThreadPoolExecutor(4) as pool:
        house.may_build.clear()
        house.engines[0].dead = True
        calls = [pool.submit(house.infer, GOOD) for _ in range(4)]
        wait_for(lambda: not house.backend.is_alive)
        time.sleep(0.02)
        assert not any(call.done() for call in calls)
        house.may_build.set()
        assert [call.result(10) for call in calls] == [1] * 4
        assert len(house.engines) == 2


def test_closing_ends_the_waiting() -> None:
    with open_house() as house, ThreadPoolExecutor(1) as pool:
        house.may_build.clear()
        house.engines[0].dead = True
        call = pool.submit(house.infer, GOOD)
        assert house.building.wait(10)
        house.backend.close()
        with pytest.raises(BackendError, match="closed"):
            call.result(10)
        house.may_build.set()
        wait_for(lambda: len(house.engines) == 2 and house.engines[1].closed)
        with pytest.raises(BackendError, match="closed"):
            house.infer(GOOD)


def test_closing_ends_a_call_that_hangs() -> None:
    with open_house() as house, ThreadPoolExecutor(1) as pool:
        call = pool.submit(house.infer, HANGING)
        wait_for(lambda: HANGING in house.engines[0].calls)
        house.backend.close()
        with pytest.raises(BackendError, match="closed"):
            call.result(10)


def test_two_calls_at_once_that_find_the_engine_dead_build_one() -> None:
    with open_house(concurrency=2) as house, ThreadPoolExecutor(2) as pool:
        house.engines[0].dead = True
        assert list(pool.map(house.infer, [GOOD, GOOD])) == [1, 1]
        assert len(house.engines) == 2


def infer_here(house: House, value: int, give_up: Callable[[], None]) -> int:
    """Number of the engine that answered in the thread that called."""
    (result,) = house.backend.infer_here([build_tile(value)], give_up)
    return result.mask_hw[0]


def refuse() -> None:
    raise AssertionError("a call was given up")


def test_a_call_can_be_made_in_the_callers_own_thread() -> None:
    with open_house() as house:
        threads: list[threading.Thread] = []
        infer = house.engines[0].infer

        def watch(tiles: Sequence[Tile]) -> list[Candidates]:
            threads.append(threading.current_thread())
            return infer(tiles)

        house.engines[0].infer = watch  # type: ignore[method-assign]
        assert infer_here(house, GOOD, refuse) == 0
        assert threads == [threading.current_thread()]
        with pytest.raises(ValueError, match="2 is not liked"):
            infer_here(house, BAD, refuse)
        assert house.told == []
        house.engines[0].dead = True
        assert infer_here(house, GOOD, refuse) == 1
        assert house.told == [False, True]


def test_who_hangs_in_his_own_thread_is_given_up_by_another() -> None:
    with open_house(timeout_s=0.05) as house, ThreadPoolExecutor(1) as pool:
        given_up = threading.Event()
        call = pool.submit(infer_here, house, HANGING, given_up.set)
        assert given_up.wait(10)
        assert not call.done()  # it is still in there
        assert infer_here(house, GOOD, refuse) == 1
        assert house.told == [False, True]
        assert not house.engines[0].closed
        house.engines[0].release.set()
        with pytest.raises(EngineHung, match=r"after 0\.05 s"):
            call.result(10)


def test_closing_gives_up_who_hangs_in_his_own_thread() -> None:
    with open_house() as house, ThreadPoolExecutor(1) as pool:
        given_up: list[bool] = []
        call = pool.submit(infer_here, house, HANGING, lambda: given_up.append(True))
        wait_for(lambda: HANGING in house.engines[0].calls)
        house.backend.close()
        assert given_up == [True]
        house.engines[0].release.set()
        with pytest.raises(EngineHung):
            call.result(10)
        with pytest.raises(BackendError, match="closed"):
            infer_here(house, GOOD, refuse)


class InterruptibleEngine(FakeEngine):
    def interrupt(self) -> None:
        self.release.set()


@pytest.mark.parametrize("by_closing", [False, True])
def test_a_call_that_hangs_is_interrupted_where_the_engine_can(by_closing: bool) -> None:
    engine = InterruptibleEngine()
    backend = RestartingBackend(
        engine, FakeEngine, probe, timeout_s=20 if by_closing else 0.05, first_pause_s=0.001
    )
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(backend.infer, [build_tile(HANGING)])
        wait_for(lambda: HANGING in engine.calls)
        if by_closing:
            backend.close()
        assert engine.release.wait(10)
        with contextlib.suppress(BackendError):
            call.result(10)
    wait_for(lambda: engine.closed)
    backend.close()


def test_a_call_that_is_interrupted_for_anothers_sake_is_done_by_the_next_engine() -> None:
    class SlowEngine(InterruptibleEngine):
        def infer(self, tiles: Sequence[Tile]) -> list[Candidates]:
            found = super().infer(tiles)
            if self.release.is_set():
                raise RuntimeError("interrupted")
            return found

    engine = SlowEngine(concurrency=2)
    backend = RestartingBackend(engine, FakeEngine, probe, timeout_s=1.0, first_pause_s=0.001)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(backend.infer, [build_tile(HANGING)])
        wait_for(lambda: len(engine.calls) == 1)
        time.sleep(0.5)
        second = pool.submit(backend.infer, [build_tile(HANGING), build_tile(GOOD)])
        with pytest.raises(EngineHung):
            first.result(10)
        wait_for(lambda: backend.current is not engine)
        current = backend.current
        assert isinstance(current, FakeEngine)
        wait_for(lambda: HANGING in current.calls)
        current.release.set()
        assert len(second.result(10)) == 2
    backend.close()


def test_what_interrupts_a_call_in_its_own_thread_is_not_its_failure() -> None:
    class Interruptible(InterruptibleEngine):
        def infer(self, tiles: Sequence[Tile]) -> list[Candidates]:
            result = super().infer(tiles)
            if self.release.is_set():
                raise RuntimeError("ended from outside")
            return result

    for _ in range(10):
        engines = [Interruptible()]

        def build(engines: list[Interruptible] = engines) -> Backend:
            engines.append(Interruptible())
            return engines[-1]

        backend = RestartingBackend(engines[0], build, probe, timeout_s=0.02)
        given_up = threading.Event()
        with pytest.raises(EngineHung):
            backend.infer_here([build_tile(HANGING)], given_up.set)
        assert given_up.wait(10)
        wait_for(lambda backend=backend: backend.is_alive)  # type: ignore[misc]
        assert len(engines) == 2 and engines[1].calls == []  # it was not tried again
        backend.close()
