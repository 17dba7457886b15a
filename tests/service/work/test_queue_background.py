"""The work queue: background work, which yields to all other."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from service.work.fair import BURST
from service.work.queue import BACKGROUND_EVERY, Job
from tests.service.work.test_queue import DONE, build_queue, pick, pick_all
from tests.support.canvases import build_job, build_work


def build_background(*values: int, client: str = "ann") -> Job:
    job = build_job(build_work(*values), client=client)
    job.priority = "background"
    return job


async def test_background_work_yields_to_every_client() -> None:
    queue = build_queue()
    jobs = build_background(*range(1, 241))
    queue.add(jobs)
    assert pick_all(queue, 3) == [jobs] * 3  # nobody else has anything
    own = build_job(build_work(*range(1, 5)), client="ann")
    batch = build_job(build_work(*range(1, 5)), client="bob", priority="batch")
    queue.add(own)
    queue.add(batch)
    assert jobs not in pick_all(queue, 8)
    assert pick_all(queue, 3) == [jobs] * 3


async def test_background_work_does_not_stand_still() -> None:
    queue = build_queue()
    jobs = build_background(*range(1, 241))
    queue.add(jobs)
    queue.add(build_job(build_work(*range(1, 241)), client="bob"))
    picked = pick_all(queue, 4 * BACKGROUND_EVERY)
    places = [index for index, job in enumerate(picked) if job is jobs]
    assert len(places) == 4
    assert all(b - a == BACKGROUND_EVERY for a, b in itertools.pairwise(places))


async def test_background_work_can_be_left_alone() -> None:
    queue = build_queue()
    queue.add(build_background(1, 2))
    assert queue and queue.pick(background=False) is None
    assert queue.pick() is not None


async def test_a_removed_background_request_leaves_nothing() -> None:
    queue = build_queue()
    job, other = build_background(1, 2, 3), build_job(build_work(1, 2), client="ann")
    queue.add(job)
    queue.add(other)
    queue.remove(job)
    assert pick_all(queue, 2) == [other] * 2
    queue.remove(other)
    assert queue.pick() is None and not queue._tenants


async def test_background_work_of_clients_takes_turns() -> None:
    queue = build_queue()
    flows = [build_background(*range(1, 241), client=name) for name in ("ann", "bob")]
    for flow in flows:
        queue.add(flow)
    counts = Counter(pick_all(queue, 100))
    assert abs(counts[flows[0]] - counts[flows[1]]) <= 2 * BURST


async def test_helpers_take_background_canvases_last() -> None:
    queue = build_queue()
    background, other = build_background(1, 2, 3), build_job(build_work(1, 2), client="bob")
    queue.add(background)
    pick(queue)
    queue.add(other)
    pick(queue)
    picked = [queue.pick_active() for _ in range(3)]
    assert [found and found[0] for found in picked] == [other, background, background]


async def test_background_work_waits_for_an_image_that_is_being_decoded() -> None:
    queue = build_queue()
    background, other = build_background(1, 2, 3, 4, 5), build_job(build_work(1, 2, 3))
    queue.add(background)
    pick(queue)
    queue.add(other)
    first = queue.pick()
    assert first is not None and first[0] is other
    assert queue.pick() is None and queue.pick_active() is None and queue.has_background
    other.images[0].open()
    assert queue.opened(other, other.images[0]) == 2
    assert pick_all(queue, 3) == [other, other, background]


@pytest.mark.parametrize("end", ["remove", "fail"])
async def test_background_work_goes_on_after_an_image_that_is_not_decoded(end: str) -> None:
    queue = build_queue()
    background, other = build_background(1, 2, 3), build_job(build_work(1, 2, 3))
    queue.add(other)
    queue.add(background)
    assert queue.pick() is not None
    assert queue.pick() is None
    if end == "remove":
        queue.remove(other)
    else:
        queue.finish(other, other.images[0], DONE)
    assert pick(queue)[0] is background


async def test_background_work_does_not_wait_for_an_image_of_one_canvas() -> None:
    queue = build_queue()
    background, other = build_background(1, 2), build_job(build_work(1))
    queue.add(other)
    queue.add(background)
    picked = [queue.pick(), queue.pick()]
    assert [found and found[0] for found in picked] == [other, background]
