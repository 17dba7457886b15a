from __future__ import annotations

from service.jobs.leases import LEASE_S, LeaseWatch


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def look(watch: LeaseWatch, clock: Clock, beats: dict[str, object], times: int) -> list[str]:
    """Looks every second; what is found at last."""
    found: list[str] = []
    for _ in range(times):
        clock.now_s += 1
        found = watch.find_lost(beats)
    return found


def test_a_worker_whose_counter_stands_still_is_lost() -> None:
    clock = Clock()
    watch = LeaseWatch("me", clock)
    assert look(watch, clock, {"me": 1, "dead": 7}, int(LEASE_S) + 1) == []
    assert look(watch, clock, {"me": 1, "dead": 7}, 1) == ["dead"]


def test_a_worker_that_counts_is_not() -> None:
    clock = Clock()
    watch = LeaseWatch("me", clock)
    for beat in range(30):
        assert look(watch, clock, {"other": beat // 4}, 1) == []


def test_a_pause_of_this_process_takes_nothing_from_others() -> None:
    clock = Clock()
    watch = LeaseWatch("me", clock)
    look(watch, clock, {"other": 1}, 2)
    clock.now_s += 1000
    assert watch.find_lost({"other": 1}) == []
    assert look(watch, clock, {"other": 1}, int(LEASE_S)) == []
    assert look(watch, clock, {"other": 1}, 1) == ["other"]
