"""Threads that take steps: waking, timeouts, resizing, replacing, ending."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from service.work.crew import Crew, Step
from tests.support.waiting import poll_until

wait_for = partial(poll_until, timeout_s=10, pause_s=0.001)


class Shop:
    """A crew with a queue of steps.

    Attributes:
        pause_s: What `next_step` gives when the queue is empty.
        asked: How often it was asked in vain.
    """

    def __init__(self, threads: int) -> None:
        self.lock = threading.Lock()
        self.steps: deque[Step] = deque()
        self.pause_s: float | None = None
        self.asked = 0
        self.ran_by: list[threading.Thread] = []
        self.crew = Crew("shop", self.lock, self.next_step, threads)

    def next_step(self) -> Step | float | None:
        assert self.lock.locked()
        if self.steps:
            return self.steps.popleft()
        self.asked += 1
        return self.pause_s

    def add(self, *steps: Callable[[], object]) -> None:
        with self.lock:
            self.steps.extend(partial(self.run, step) for step in steps)
            self.crew.wake(len(steps))

    def run(self, step: Callable[[], object]) -> None:
        self.ran_by.append(threading.current_thread())
        step()

    def close(self) -> None:
        with self.lock:
            self.crew.stop()


@pytest.fixture
def shop() -> Iterator[Shop]:
    shop = Shop(2)
    yield shop
    shop.close()


def alive() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "shop"]


def test_threads_start_with_work_and_end_with_the_crew(shop: Shop) -> None:
    assert alive() == []
    both = threading.Barrier(2, timeout=10)
    shop.add(both.wait, both.wait)
    wait_for(lambda: len(shop.ran_by) == 2 and shop.asked >= 2)
    assert len(alive()) == 2
    shop.close()
    wait_for(lambda: alive() == [])
    shop.add(lambda: None)
    assert len(shop.steps) == 1 and alive() == []


def test_no_more_threads_than_work(shop: Shop) -> None:
    shop.add(lambda: None)
    wait_for(lambda: shop.asked == 1)
    shop.add(lambda: None)
    wait_for(lambda: shop.asked == 2)
    assert len(alive()) == 1
    assert shop.ran_by[0] is shop.ran_by[1]


def test_a_thread_that_has_ended_its_step_takes_the_next_without_being_woken(shop: Shop) -> None:
    done = threading.Event()
    shop.add(*[lambda: None] * 500, done.set)
    assert done.wait(10)
    wait_for(lambda: not shop.steps)


def test_every_step_runs_once_whoever_adds_it() -> None:
    shop = Shop(3)
    counts: deque[int] = deque()

    def add(number: int) -> None:
        for index in range(300):
            shop.add(partial(counts.append, number * 1000 + index))
            if index % 50 == 0:
                time.sleep(0.001)

    adders = [threading.Thread(target=add, args=(n,)) for n in range(3)]
    for thread in adders:
        thread.start()
    wait_for(lambda: len(counts) == 900)
    assert len(set(counts)) == 900
    shop.close()


def test_a_step_that_fails_is_logged_and_the_thread_goes_on(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise SystemExit("7 is wrong")

    shop.add(fail)
    wait_for(lambda: shop.asked == 1)
    shop.add(lambda: None)
    wait_for(lambda: len(shop.ran_by) == 2)
    assert shop.ran_by[0] is shop.ran_by[1]
    assert "a step failed" in caplog.text


def test_a_pause_is_waited_for_and_then_asked_again(shop: Shop) -> None:
    shop.pause_s = 0.005
    shop.add(lambda: None)
    wait_for(lambda: shop.asked >= 4)
    shop.pause_s = None
    asked = shop.asked
    time.sleep(0.03)
    assert shop.asked <= asked + 1
    with shop.lock:  # timed-out threads must not be counted as idle twice
        assert len(shop.crew._idle) == len(alive()) == 1


def test_waking_reaches_a_thread_in_a_pause(shop: Shop) -> None:
    shop.pause_s = 100.0
    shop.add(lambda: None)
    wait_for(lambda: shop.asked == 1)
    shop.add(lambda: None)
    wait_for(lambda: len(shop.ran_by) == 2)
    assert len(alive()) == 1


def test_a_crew_grows_and_shrinks(shop: Shop) -> None:
    with shop.lock:
        shop.crew.resize(4)
    four = threading.Barrier(4, timeout=10)
    shop.add(*[four.wait] * 4)
    wait_for(lambda: len(shop.ran_by) == 4)
    with shop.lock:
        shop.crew.resize(1)
    wait_for(lambda: len(alive()) == 1)
    shop.add(lambda: None, lambda: None)
    wait_for(lambda: len(shop.ran_by) == 6)
    assert len(alive()) == 1


def test_a_thread_that_is_replaced_ends_after_its_step_and_another_works() -> None:
    shop, go = Shop(1), threading.Event()
    shop.add(go.wait)
    wait_for(lambda: len(shop.ran_by) == 1)
    (stuck,) = shop.ran_by
    with shop.lock:
        assert shop.crew.replace(stuck)
        assert not shop.crew.replace(stuck)  # it is none of them any more
    shop.add(lambda: None)
    wait_for(lambda: len(shop.ran_by) == 2)
    assert shop.ran_by[1] is not stuck
    go.set()
    stuck.join(10)
    assert not stuck.is_alive()
    shop.add(lambda: None)
    wait_for(lambda: len(shop.ran_by) == 3)
    assert shop.ran_by[2] is shop.ran_by[1]
    shop.close()


def test_the_thread_that_replaces_another_takes_what_was_queued_before() -> None:
    shop, go = Shop(1), threading.Event()
    shop.add(go.wait)
    wait_for(lambda: len(shop.ran_by) == 1)
    shop.add(lambda: None)
    with shop.lock:
        assert shop.crew.replace(shop.ran_by[0])
    wait_for(lambda: len(shop.ran_by) == 2)  # though nobody has called `wake` since
    go.set()
    shop.close()


def test_one_thread_is_woken_unless_more_are_asked_for(shop: Shop) -> None:
    with shop.lock:
        shop.crew.wake()
        assert len(shop.crew._threads) == 1
    wait_for(lambda: shop.asked == 1)
    assert all(thread.daemon for thread in alive())


def test_no_more_threads_are_started_than_the_crew_has(shop: Shop) -> None:
    with shop.lock:
        for _ in range(2):
            shop.crew.wake(9)
            assert len(alive()) == 2


def test_a_pause_that_ends_while_its_thread_is_woken_loses_no_thread() -> None:
    shop = Shop(1)
    shop.pause_s = 0.01
    shop.add(lambda: None)
    wait_for(lambda: shop.asked >= 2)
    with shop.lock:
        time.sleep(0.1)  # the pause is over, and the thread waits for the lock
        shop.crew.wake()
        assert shop.crew._idle == []
    shop.add(lambda: None)
    wait_for(lambda: len(shop.ran_by) == 2)
    assert shop.ran_by[0] is shop.ran_by[1]
    shop.close()


def test_a_surplus_thread_is_not_replaced(shop: Shop) -> None:
    go = threading.Event()
    shop.add(go.wait, go.wait)
    wait_for(lambda: len(shop.ran_by) == 2)
    with shop.lock:
        shop.crew.resize(1)
        assert shop.crew.replace(shop.ran_by[0])
        assert set(alive()) == set(shop.ran_by)
    go.set()
    wait_for(lambda: len(alive()) == 1)
    assert alive() == [shop.ran_by[1]]


def test_join_waits_for_the_step_of_each_thread_but_not_forever() -> None:
    shop, go = Shop(2), threading.Event()
    shop.add(go.wait, go.wait)
    wait_for(lambda: len(shop.ran_by) == 2)
    with shop.lock:
        shop.crew.replace(shop.ran_by[0])  # it may use C++ code all the same
    shop.close()
    shop.crew.join(0.01)
    assert all(thread.is_alive() for thread in shop.ran_by)
    threading.Timer(0.05, go.set).start()
    shop.crew.join(10)
    assert not any(thread.is_alive() for thread in shop.ran_by)
    shop.crew.join(10)
    assert shop.crew._running == set()
