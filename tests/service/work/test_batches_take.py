"""Which canvases the next engine call gets, at a time that the test sets."""

from __future__ import annotations

import types

import pytest

from service.work import batches as module
from service.work.batches import Batches, Canvas
from service.work.policy import Policy
from service.work.request import Outcome
from tests.support.canvases import build_config, build_job, build_work

NOW_S = 1000.0


@pytest.fixture(autouse=True)
def frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: NOW_S))


def policy(max_batch: int = 2, max_delay_s: float = 1.0, calls: int = 1) -> Policy:
    return Policy(threads=1, calls=calls, batch=True, max_batch=max_batch, max_delay_s=max_delay_s)


def build(age_s: float = 0.0, width: int = 4) -> Canvas:
    """A canvas of [4, width] px of an image of its own; needs a running event loop."""
    job = build_job(build_work(1, config=build_config(4, width)))
    (image,) = job.images
    image.open()
    return Canvas(job, image, 0, image.make_canvas(0)[0], NOW_S - age_s)


def fill(*canvases: Canvas) -> Batches:
    batches = Batches()
    for canvas in canvases:
        batches.put(canvas)
    return batches


async def test_nothing_waits_in_the_beginning() -> None:
    batches = Batches()
    assert (batches.waiting, batches.preparing, batches.calls) == (0, 0, 0)
    assert batches.take(policy(), at_once=True) == [] and batches.calls == 0
    assert batches.seconds_until_ripe(policy()) is None


async def test_a_full_bucket_is_taken_oldest_first_and_the_rest_stays() -> None:
    canvases = [build() for _ in range(3)]
    batches = fill(*canvases)
    assert batches.take(policy(max_batch=4), at_once=False) == []
    assert batches.take(policy(max_batch=2), at_once=False) == canvases[:2]
    assert (batches.waiting, batches.calls) == (1, 1)
    assert batches.take(policy(max_batch=1), at_once=False) == []  # the only call is in flight
    batches.returned(canvases[:2])
    assert list(batches.results) == canvases[:2]
    for canvas in canvases[:2]:
        batches.searched(canvas)
    assert batches.take(policy(max_batch=1), at_once=False) == canvases[2:]
    assert batches.buckets == {}


@pytest.mark.parametrize(("age_s", "taken"), [(0.99, False), (1.0, True), (1.01, True)])
async def test_a_canvas_waits_for_its_delay_and_no_longer(age_s: float, taken: bool) -> None:
    canvas = build(age_s)
    assert fill(canvas).take(policy(), at_once=False) == ([canvas] if taken else [])
    assert fill(canvas).take(policy(), at_once=True) == [canvas]


async def test_of_several_shapes_the_one_that_waits_longest_is_next() -> None:
    young, old = build(2.0, width=4), build(3.0, width=8)
    batches = fill(young, old)
    assert batches.waiting == 2
    assert batches.take(policy(calls=2), at_once=False) == [old]
    assert batches.take(policy(calls=2), at_once=False) == [young]
    assert batches.calls == 2


async def test_what_failed_together_runs_alone_and_first() -> None:
    waiting, failed, gone = build(5.0), [build(), build()], build()
    batches = fill(waiting)
    batches.retry.extend([gone, *failed])
    gone.job.removed = True
    assert batches.waiting == 4
    assert batches.take(policy(calls=9), at_once=False) == failed[:1]
    assert batches.take(policy(calls=9), at_once=False) == failed[1:]
    assert batches.take(policy(calls=9), at_once=False) == [waiting]
    assert (batches.waiting, batches.calls) == (0, 3)


async def test_canvases_that_nobody_needs_take_no_call() -> None:
    left, failed, needed = build(3.0), build(3.0), build(0.0, width=8)
    left.job.removed = True
    failed.image.outcome = Outcome(b"{}", error=ValueError())
    batches = fill(left, failed)
    assert batches.take(policy(), at_once=False) == []
    assert (batches.calls, batches.buckets) == (0, {})
    batches = fill(left, failed, needed)
    assert batches.take(policy(), at_once=True) == [needed]
    assert batches.calls == 1


@pytest.mark.parametrize("calls", [1, 2])
async def test_two_rounds_of_calls_are_post_processed_before_more(calls: int) -> None:
    """One canvas that is not post-processed keeps the memory of its whole batch."""
    batches = fill(*(build(9.0) for _ in range(2 * (2 * calls + 1))))
    taken = []
    for _ in range(2 * calls):
        taken.append(batches.take(policy(calls=calls), at_once=True))
        batches.returned(taken[-1])
    assert [len(batch) for batch in taken] == [2] * (2 * calls)
    assert batches.take(policy(calls=calls), at_once=True) == []
    for batch in taken:
        batches.searched(batch[0])
        assert batches.take(policy(calls=calls), at_once=True) == []
        assert batches.seconds_until_ripe(policy(calls=calls)) is None, "a thread would not sleep"
    batches.searched(taken[0][1])
    assert len(batches.take(policy(calls=calls), at_once=True)) == 2
    assert batches.pinned == 4 * calls


async def test_batches_that_failed_pin_nothing() -> None:
    batches = fill(*(build(9.0) for _ in range(4)))
    for _ in range(2):
        batch = batches.take(policy(calls=2), at_once=True)
        assert len(batch) == 2
        batches.failed(batch)
        for canvas in batch:
            batches.searched(canvas)  # as one that ran alone: it shared no call
    assert (batches.pinned, batches.calls) == (0, 0)


async def test_the_time_until_a_batch_may_start() -> None:
    batches = fill(build(0.25, width=4), build(0.75, width=8))
    assert batches.seconds_until_ripe(policy()) == pytest.approx(0.25)
    assert batches.seconds_until_ripe(policy(max_delay_s=0.5)) == 0.0
    batches.calls = 1
    assert batches.seconds_until_ripe(policy()) is None
    assert batches.seconds_until_ripe(policy(calls=2)) == pytest.approx(0.25)
