"""What the watchdog and the waiting of calls cost, and what happens to calls that end meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.types import Candidates, Tile
from service.engines.base import Backend
from tests.service.engines.test_watch import (
    BAD,
    GOOD,
    HANGING,
    FakeEngine,
    build_tile,
    open_house,
    refuse,
    wait_for,
)


def test_a_call_that_has_ended_is_not_given_up_later() -> None:
    with open_house(timeout_s=0.04) as house:
        assert house.infer(GOOD, give_up=refuse) == 0
        time.sleep(0.15)
        assert house.deaths == [] and house.backend.is_alive


def test_a_call_is_given_up_once_however_long_it_hangs() -> None:
    with open_house(timeout_s=0.04) as house, ThreadPoolExecutor(1) as pool:
        given_up: list[bool] = []
        pool.submit(house.infer, HANGING, give_up=lambda: given_up.append(True))
        wait_for(lambda: len(given_up) == 1)
        time.sleep(0.1)
        assert given_up == [True] and len(house.deaths) == 1
        for engine in house.engines:
            engine.release.set()


@pytest.mark.parametrize(("timeout_s", "pause_s"), [(0.4, 0.1), (4.0, 1.0), (600.0, 1.0)])
def test_calls_are_looked_at_four_times_within_the_limit_and_once_a_second(
    monkeypatch: pytest.MonkeyPatch, timeout_s: float, pause_s: float
) -> None:
    with open_house(timeout_s=timeout_s) as house:
        pauses: list[float] = []
        closed = house.backend._closed
        wait = closed.wait

        def watch(pause_s: float) -> bool:
            pauses.append(pause_s)
            return wait(20)

        monkeypatch.setattr(closed, "wait", watch)
        house.infer(GOOD)
        wait_for(lambda: len(pauses) == 1)
        assert pauses == [pytest.approx(pause_s)]
        watchdogs = [thread for thread in threading.enumerate() if thread.name == "watchdog"]
        assert watchdogs and all(thread.daemon for thread in watchdogs)


def test_waiting_for_another_engine_takes_no_cpu_time() -> None:
    with open_house() as house, ThreadPoolExecutor(1) as pool:

        def measure() -> float:
            began_s = time.thread_time()
            house.infer(GOOD)
            return time.thread_time() - began_s

        house.may_build.clear()
        house.engines[0].dead = True
        call = pool.submit(measure)
        wait_for(lambda: not house.backend.is_alive)
        time.sleep(0.5)
        assert not call.done()
        house.may_build.set()
        assert call.result(10) < 0.2


def test_an_engine_that_has_just_failed_gets_no_call() -> None:
    """The wait for an engine ends, and before the call is counted this one has failed too."""

    class Flapping(threading.Event):
        returns = 0

        def wait(self, timeout: float | None = None) -> bool:
            self.returns += 1
            return self.returns == 1 or super().wait(timeout)

    with open_house() as house, ThreadPoolExecutor(1) as pool:
        usable = house.backend._usable = Flapping()
        call = pool.submit(house.infer, GOOD, give_up=refuse)
        wait_for(lambda: usable.returns >= 2)
        assert house.engines[0].calls == [] and not call.done()
        house.build()
        assert call.result(10) == 1


def test_an_engine_is_probed_once_and_the_call_that_failed_not_repeated(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with open_house() as house:
        with pytest.raises(ValueError, match="2 is not liked"):
            house.infer(BAD, give_up=refuse)
        assert house.engines[0].calls == [BAD, GOOD]
        assert caplog.text == ""


def test_an_engine_that_fails_after_it_was_swapped_out_is_not_probed() -> None:
    """It is not used any more: the call is made by the next one."""
    with open_house(concurrency=2) as house, ThreadPoolExecutor(1) as pool:
        first, inside, go = house.engines[0], threading.Event(), threading.Event()

        def fail(tiles: Sequence[Tile]) -> list[Candidates]:
            first.calls.append(BAD)
            inside.set()
            assert go.wait(20)
            raise MemoryError("bad allocation")

        first.infer = fail  # type: ignore[method-assign]
        call = pool.submit(house.infer, GOOD, give_up=refuse)
        assert inside.wait(10)
        house.build()
        go.set()
        assert call.result(10) == 1
        assert first.calls == [BAD] and house.engines[1].calls == [GOOD]
        assert house.deaths == [] and house.backend.current is house.engines[1]
        wait_for(lambda: first.closed)


def test_a_call_that_failed_just_before_the_end_has_its_own_error() -> None:
    """Its engine was swapped out, and is closed after its last call; that is when all ends."""
    with open_house() as house, ThreadPoolExecutor(1) as pool:
        first = house.engines[0]
        call = pool.submit(house.infer, HANGING, BAD, give_up=refuse)
        wait_for(lambda: HANGING in first.calls)
        house.build()
        first.close = house.backend.close  # type: ignore[method-assign]
        first.release.set()
        with pytest.raises(ValueError, match="2 is not liked"):
            call.result(10)
        assert house.backend.is_closed


def test_a_failure_is_logged_with_what_shows_it(caplog: pytest.LogCaptureFixture) -> None:
    with open_house() as house:
        house.engines[0].dead = True
        assert house.infer(GOOD) == 1
    (warning, error) = caplog.records
    assert warning.levelname == "WARNING"
    assert "failed on a known-good image: MemoryError('bad allocation')" in warning.getMessage()
    assert error.levelname == "ERROR"
    assert "the engine has failed, another is built: it raised" in error.getMessage()


def test_a_probe_of_an_engine_is_made_with_that_engine() -> None:
    with open_house() as house:
        probed: list[Backend] = []

        def probe(backend: Backend) -> None:
            probed.append(backend)
            backend.infer([build_tile(GOOD)])

        house.backend._probe = probe
        with pytest.raises(ValueError, match="not liked"):
            house.infer(BAD)
        assert probed == [house.engines[0]] and isinstance(probed[0], FakeEngine)
