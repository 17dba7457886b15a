"""The budget of decoded pixels."""

from __future__ import annotations

import threading

from service.work.pixels import PixelBudget


def test_images_are_let_in_until_their_half_is_full() -> None:
    budget = PixelBudget(1600)
    assert budget.take(100, "a") and budget.take(100, "b")  # small: at most a sixteenth
    assert budget.held == 200
    assert all(budget.take(100, client) for client in "cdefgh")
    assert not budget.take(1, "i")
    budget.release(100, "a")
    assert budget.take(100, "i")


def test_large_images_do_not_keep_small_ones_waiting_and_the_reverse() -> None:
    budget = PixelBudget(1600)
    assert budget.take(101, "a")  # large
    assert budget.take(699, "b")
    assert not budget.take(101, "c")
    assert all(budget.take(100, client) for client in "abcdefgh")
    assert not budget.take(100, "i")
    assert budget.held == 1600
    budget.release(699, "b")
    assert not budget.take(100, "i")
    assert budget.take(600, "b")


def test_a_client_leaves_as_much_of_a_half_as_it_holds() -> None:
    budget = PixelBudget(1600)
    assert [budget.take(100, "a") for _ in range(5)] == [True] * 4 + [False]
    assert budget.take(100, "b") and budget.take(100, "b")
    assert not budget.take(100, "b")
    assert budget.take(100, "c") and not budget.take(100, "c")
    assert budget.take(700, "a") and not budget.take(101, "a")  # the other half
    for _ in range(3):
        budget.release(100, "a")
    assert budget.take(100, "a") and not budget.take(100, "a")
    assert budget.held == 500 + 700


def test_one_image_is_let_in_however_large() -> None:
    budget = PixelBudget(16)
    assert budget.take(10_000, "a")
    assert not budget.take(10_000, "a")
    budget.release(10_000, "a")
    assert budget.take(10_000, "a")


def test_releases_are_counted_and_told_until_forgotten() -> None:
    budget = PixelBudget()
    calls: list[int] = []

    def note() -> None:
        calls.append(budget.generation)

    budget.on_release(note)
    for _ in range(2):
        assert budget.take(5, "a")
        budget.release(5, "a")
    assert calls == [1, 2]
    budget.forget(note)
    budget.forget(note)
    assert budget.take(5, "a")
    budget.release(5, "a")
    assert calls == [1, 2] and budget.generation == 3 and budget.held == 0


def test_threads_lose_nothing() -> None:
    budget = PixelBudget(1 << 20)

    def work() -> None:
        for _ in range(2000):
            if budget.take(7, "a"):
                budget.release(7, "a")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert budget.held == 0
