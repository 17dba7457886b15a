from __future__ import annotations

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
from service.engines.state import EngineBuild, EngineState
from service.engines.watch import EngineHung, WatchedEngine
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
    """A watched engine with the engines that were built for it, in threads as the store does.

    Attributes:
        deaths: Reasons of the deaths that were reported.
    """

    def __init__(self, *, failures: int = 0, concurrency: int = 1, timeout_s: float = 10.0) -> None:
        self.engines = [FakeEngine(concurrency=concurrency)]
        self.failures = failures
        self.deaths: list[str] = []
        self.building = threading.Event()
        self.may_build = threading.Event()
        self.may_build.set()
        self.backend = WatchedEngine(
            self.engines[0], probe, timeout_s=timeout_s, on_death=self.rebuild
        )

    def rebuild(self, reason: str) -> None:
        self.deaths.append(reason)
        threading.Thread(target=self.build, daemon=True).start()

    def build(self) -> None:
        self.building.set()
        assert self.may_build.wait(20)
        engine = FakeEngine(len(self.engines))
        self.engines.append(engine)
        self.backend.swap(engine)

    def infer(self, *values: int, give_up: Callable[[], None] = lambda: None) -> int:
        """Number of the engine that answered."""
        results = self.backend.infer([build_tile(value) for value in values], give_up)
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


def refuse() -> None:
    raise AssertionError("a call was given up")


def test_a_healthy_engine_is_called_in_the_callers_thread() -> None:
    with open_house() as house:
        threads: list[threading.Thread] = []
        infer = house.engines[0].infer

        def watch(tiles: Sequence[Tile]) -> list[Candidates]:
            threads.append(threading.current_thread())
            return infer(tiles)

        house.engines[0].infer = watch  # type: ignore[method-assign]
        assert house.infer(GOOD, GOOD, give_up=refuse) == 0
        assert threads == [threading.current_thread()]
        assert house.backend.current is house.engines[0]
        assert house.backend.is_alive and house.deaths == []


def test_the_state_is_that_of_the_engine_of_the_moment() -> None:
    with open_house() as house:
        wanted = EngineState("fake", "cpu", "fp32", "a test")
        assert house.backend.state == wanted
        house.engines[0].canvas_s = {"fake fp32": 0.5}  # type: ignore[attr-defined]
        assert house.backend.state.canvas_s == {"fake fp32": 0.5}
        house.backend.build = EngineBuild("building", 0.5)
        assert house.backend.state.build == EngineBuild("building", 0.5)
        house.may_build.clear()
        house.engines[0].dead = True
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(house.infer, GOOD)
            wait_for(lambda: not house.backend.state.is_alive)
            house.may_build.set()
            assert call.result(10) == 1
        assert house.backend.state.is_alive


def test_an_image_that_the_engine_does_not_like_is_not_the_engines_death() -> None:
    with open_house() as house:
        with pytest.raises(ValueError, match="2 is not liked"):
            house.infer(BAD, give_up=refuse)
        assert house.infer(GOOD) == 0
        assert house.deaths == [] and len(house.engines) == 1


def test_a_dead_engine_is_replaced_and_the_call_is_made_again() -> None:
    with open_house() as house:
        house.engines[0].dead = True
        assert house.infer(GOOD, give_up=refuse) == 1
        (reason,) = house.deaths
        assert "MemoryError('bad allocation')" in reason and "known-good image" in reason
        wait_for(lambda: house.engines[0].closed)


def test_what_kills_two_engines_is_given_up_and_the_next_is_built() -> None:
    with open_house() as house:
        with pytest.raises(MemoryError):
            house.infer(DEADLY)
        assert house.engines[1].calls == [DEADLY]
        assert house.infer(GOOD) == 2
        assert len(house.deaths) == 2


def test_a_call_that_hangs_is_given_up_and_another_engine_built() -> None:
    with open_house(timeout_s=0.05) as house, ThreadPoolExecutor(1) as pool:
        given_up = threading.Event()
        call = pool.submit(house.infer, HANGING, give_up=given_up.set)
        assert given_up.wait(10)
        assert not call.done()  # it is still in there
        assert house.infer(GOOD, give_up=refuse) == 1
        assert house.deaths == ["a call has not returned after 0.05 s"]
        assert not house.engines[0].closed  # its thread may still use it
        house.engines[0].release.set()
        with pytest.raises(EngineHung, match=r"not returned after 0\.05 s"):
            call.result(10)
        wait_for(lambda: house.engines[0].closed)


def test_a_probe_that_hangs_is_a_death_too() -> None:
    with open_house(timeout_s=0.05) as house, ThreadPoolExecutor(1) as pool:
        given_up = threading.Event()

        def hang(backend: Backend) -> None:
            backend.infer([build_tile(HANGING)])

        house.backend._probe = hang
        call = pool.submit(house.infer, BAD, give_up=given_up.set)
        assert given_up.wait(10)
        house.backend._probe = probe
        assert house.infer(GOOD) == 1
        house.engines[0].release.set()
        with pytest.raises(EngineHung):
            call.result(10)


def test_a_call_within_its_time_is_not_given_up() -> None:
    with open_house(timeout_s=0.4) as house, ThreadPoolExecutor(1) as pool:
        call = pool.submit(house.infer, HANGING, give_up=refuse)
        wait_for(lambda: HANGING in house.engines[0].calls)
        time.sleep(0.2)
        assert house.backend.is_alive and house.deaths == []
        house.engines[0].release.set()
        assert call.result(10) == 0


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
        assert len(house.engines) == 2 and len(house.deaths) == 1


def test_two_calls_at_once_that_find_the_engine_dead_report_one_death() -> None:
    with open_house(concurrency=2) as house, ThreadPoolExecutor(2) as pool:
        house.engines[0].dead = True
        assert list(pool.map(house.infer, [GOOD, GOOD])) == [1, 1]
        assert len(house.engines) == 2 and len(house.deaths) == 1


def test_a_swap_lets_calls_in_flight_finish_and_then_closes_the_old_engine() -> None:
    with open_house(concurrency=2) as house, ThreadPoolExecutor(1) as pool:
        call = pool.submit(house.infer, HANGING)
        wait_for(lambda: HANGING in house.engines[0].calls)
        house.build()
        assert house.infer(GOOD) == 1
        assert not house.engines[0].closed and house.deaths == []
        house.engines[0].release.set()
        assert call.result(10) == 0
        wait_for(lambda: house.engines[0].closed)
        assert not house.engines[1].closed
        assert not house.backend._retired and house.engines[0] not in house.backend._in_use


def test_a_swap_closes_an_unused_engine_at_once() -> None:
    with open_house() as house:
        house.infer(GOOD)
        house.build()
        assert house.engines[0].closed and not house.engines[1].closed


def test_an_engine_that_cannot_be_closed_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    with open_house() as house:

        def fail() -> None:
            raise OSError("busy")

        house.engines[0].close = fail  # type: ignore[method-assign]
        house.build()
        assert house.infer(GOOD) == 1
        assert "fake could not be closed" in caplog.text


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


def test_closing_gives_up_calls_that_hang() -> None:
    with open_house() as house, ThreadPoolExecutor(1) as pool:
        given_up: list[bool] = []
        call = pool.submit(house.infer, HANGING, give_up=lambda: given_up.append(True))
        wait_for(lambda: HANGING in house.engines[0].calls)
        house.backend.close()
        assert given_up == [True] and house.engines[0].closed
        house.engines[0].release.set()
        with pytest.raises(EngineHung):
            call.result(10)
        with pytest.raises(BackendError, match="closed"):
            house.infer(GOOD, give_up=refuse)
        assert house.deaths == []


class InterruptibleEngine(FakeEngine):
    """Its calls can be ended; then they raise."""

    def interrupt(self) -> None:
        self.release.set()

    def infer(self, tiles: Sequence[Tile]) -> list[Candidates]:
        found = super().infer(tiles)
        if self.release.is_set():
            raise RuntimeError("interrupted")
        return found


@pytest.mark.parametrize("by_closing", [False, True])
def test_a_call_that_hangs_is_interrupted_where_the_engine_can(by_closing: bool) -> None:
    engine = InterruptibleEngine()
    backend = WatchedEngine(
        engine,
        probe,
        timeout_s=20 if by_closing else 0.05,
        on_death=lambda reason: backend.swap(FakeEngine()),
    )
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(backend.infer, [build_tile(HANGING)], lambda: None)
        wait_for(lambda: HANGING in engine.calls)
        if by_closing:
            backend.close()
        assert engine.release.wait(10)
        with pytest.raises(EngineHung):  # not the interruption's error, and not tried again
            call.result(10)
    wait_for(lambda: engine.closed)
    backend.close()


def test_a_call_that_is_interrupted_for_anothers_sake_is_done_by_the_next_engine() -> None:
    engine, other = InterruptibleEngine(concurrency=2), FakeEngine(1)
    backend = WatchedEngine(
        engine, probe, timeout_s=1.0, on_death=lambda reason: backend.swap(other)
    )
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(backend.infer, [build_tile(HANGING)], lambda: None)
        wait_for(lambda: len(engine.calls) == 1)
        time.sleep(0.5)
        second = pool.submit(backend.infer, [build_tile(HANGING), build_tile(GOOD)], refuse)
        with pytest.raises(EngineHung):
            first.result(10)
        wait_for(lambda: HANGING in other.calls)
        other.release.set()
        assert len(second.result(10)) == 2
    backend.close()
