"""The budget of decoded pixels."""

from __future__ import annotations

import threading

from service.work.pixels import PixelBudget


def test_images_are_let_in_until_their_half_is_full() -> None:
    budget = PixelBudget(1600)
    assert budget.take(100) and budget.take(100)  # small: at most a sixteenth
    assert budget.held == 200
    assert all(budget.take(100) for _ in range(6))
    assert not budget.take(1)
    budget.release(100)
    assert budget.take(100)


def test_large_images_do_not_keep_small_ones_waiting_and_the_reverse() -> None:
    budget = PixelBudget(1600)
    assert budget.take(101)  # large
    assert budget.take(699)
    assert not budget.take(101)
    assert all(budget.take(100) for _ in range(8))
    assert not budget.take(100)
    assert budget.held == 1600
    budget.release(699)
    assert not budget.take(100)
    assert budget.take(600)


def test_one_image_is_let_in_however_large() -> None:
    budget = PixelBudget(16)
    assert budget.take(10_000)
    assert not budget.take(10_000)
    budget.release(10_000)
    assert budget.take(10_000)


def test_releases_are_counted_and_told_until_forgotten() -> None:
    budget = PixelBudget()
    calls: list[int] = []

    def note() -> None:
        calls.append(budget.generation)

    budget.on_release(note)
    for _ in range(2):
        assert budget.take(5)
        budget.release(5)
    assert calls == [1, 2]
    budget.forget(note)
    budget.forget(note)
    assert budget.take(5)
    budget.release(5)
    assert calls == [1, 2] and budget.generation == 3 and budget.held == 0


def test_threads_lose_nothing() -> None:
    budget = PixelBudget(1 << 20)

    def work() -> None:
        for _ in range(2000):
            if budget.take(7):
                budget.release(7)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert budget.held == 0
