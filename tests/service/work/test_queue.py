"""The work queue: which canvas is next."""

from __future__ import annotations

import weakref
from collections import Counter

import pytest

from service.work.fair import BURST
from service.work.image import ImageWork
from service.work.pixels import PixelBudget
from service.work.queue import BATCH_EVERY, Job, WorkQueue
from service.work.request import ClientProfile, Outcome
from tests.support.canvases import build_job, build_work

DONE = Outcome(b"{}")


def build_queue(budget: PixelBudget | None = None) -> WorkQueue:
    return WorkQueue(budget or PixelBudget())


def pick(queue: WorkQueue) -> tuple[Job, ImageWork, int]:
    """The next canvas; its image is opened as a thread would."""
    picked = queue.pick()
    assert picked is not None
    job, image, index = picked
    if index == 0:
        image.open()
        queue.opened(job, image)
    return picked


def pick_all(queue: WorkQueue, canvases: int) -> list[Job]:
    return [pick(queue)[0] for _ in range(canvases)]


def settle(queue: WorkQueue, *jobs: Job, canvases: int = 400) -> None:
    """Serves jobs until their bursts, and those of their clients, are over."""
    for _ in range(canvases):
        pick(queue)
    assert all(job.burst == 0 for job in jobs)


async def test_an_empty_queue_has_nothing() -> None:
    queue = build_queue()
    assert queue.pick() is None and queue.pick_active() is None


async def test_canvases_of_an_image_come_once_each_and_in_order() -> None:
    queue = build_queue()
    job = build_job(build_work(1, 2, 3))
    queue.add(job)
    assert queue
    assert [pick(queue)[2] for _ in range(3)] == [0, 1, 2]
    assert not queue and queue.pick() is None


async def test_an_image_that_is_being_opened_has_no_other_canvas_yet() -> None:
    queue = build_queue()
    job = build_job(build_work(1, 2), build_work(3))
    queue.add(job)
    first = queue.pick()
    assert first is not None and first[1:] == (job.images[0], 0)
    second = queue.pick()  # another thread may open the next image
    assert second is not None and second[1:] == (job.images[1], 0)
    assert queue.pick() is None
    job.images[0].open()
    assert queue.opened(job, job.images[0]) == 1
    third = queue.pick()
    assert third is not None and third[1:] == (job.images[0], 1)
    assert queue.opened(job, job.images[1]) == 0


async def test_clients_take_turns_and_requests_of_a_client_too() -> None:
    queue = build_queue()
    ann = [build_job(build_work(*range(1, 241)), client="ann") for _ in range(2)]
    bob = build_job(build_work(*range(1, 241)), client="bob")
    for job in (*ann, bob):
        queue.add(job)
    settle(queue, *ann, bob, canvases=100)
    counts = Counter(map(id, pick_all(queue, 100)))
    assert counts[id(bob)] == 50
    assert abs(counts[id(ann[0])] - counts[id(ann[1])]) <= 1


async def test_weights_are_the_clients() -> None:
    queue = build_queue()
    heavy = build_job(build_work(*range(1, 241)), client=ClientProfile(name="a", weight=3.0))
    light = build_job(build_work(*range(1, 241)), client=ClientProfile(name="b"))
    queue.add(heavy)
    queue.add(light)
    settle(queue, heavy, light, canvases=60)
    served = pick_all(queue, 100)
    assert abs(served.count(heavy) - 75) <= 2


async def test_a_short_request_passes_a_long_one_of_the_same_client() -> None:
    queue = build_queue()
    long = build_job(build_work(*range(1, 241)))
    queue.add(long)
    settle(queue, long, canvases=100)
    short = build_job(build_work(1, 2, 3, 4))
    queue.add(short)
    served = pick_all(queue, 6)
    assert served[0] is short and served.count(short) == 4


async def test_short_requests_of_a_client_are_finished_one_after_the_other() -> None:
    queue = build_queue()
    jobs = [build_job(build_work(1, 2, 3, 4)) for _ in range(3)]
    for job in jobs:
        queue.add(job)
    assert pick_all(queue, 3) == jobs  # while an image is opened, the next may be too
    assert pick_all(queue, 9) == [job for job in jobs for _ in range(3)]


@pytest.mark.parametrize("first", ["interactive", "batch"])
async def test_a_clients_batch_work_gets_one_canvas_of_eight(first: str) -> None:
    queue = build_queue()
    jobs = {
        priority: build_job(build_work(*range(1, 241)), priority=priority)
        for priority in ("interactive", "batch")
    }
    queue.add(jobs.pop(first))
    (other,) = jobs.values()
    queue.add(other)
    served = [job.priority for job in pick_all(queue, 240)]
    assert BATCH_EVERY == 8 and served.index("batch") == 7
    for start in range(240 - BATCH_EVERY):
        assert "batch" in served[start : start + BATCH_EVERY]
    assert served.count("batch") == 240 // BATCH_EVERY


async def test_batch_work_alone_is_not_held_back() -> None:
    queue = build_queue()
    job = build_job(build_work(1, 2, 3), priority="batch")
    queue.add(job)
    assert pick_all(queue, 3) == [job] * 3


async def test_priorities_are_a_matter_within_a_client() -> None:
    queue = build_queue()
    ann = build_job(build_work(*range(1, 201)), client="ann", priority="batch")
    bob = build_job(build_work(*range(1, 201)), client="bob")
    queue.add(ann)
    queue.add(bob)
    settle(queue, ann, bob, canvases=60)
    assert pick_all(queue, 100).count(ann) == 50


async def test_removed_requests_are_not_picked_and_give_their_pixels_back() -> None:
    budget = PixelBudget()
    queue = build_queue(budget)
    gone, stays = build_job(build_work(1, 2), build_work(3)), build_job(build_work(4))
    queue.add(gone)
    queue.add(stays)
    assert pick(queue)[0] is gone
    assert budget.held == gone.images[0].pixels == 32
    assert queue.remove(gone) == [32]
    assert queue.remove(gone) == []
    assert all(gone.skips(image) for image in gone.images)
    assert pick(queue)[0] is stays
    assert queue.pick() is None and queue.pick_active() is None


@pytest.mark.parametrize("by", ["leaving", "ending"])
async def test_an_image_that_is_not_needed_any_more_is_not_kept(by: str) -> None:
    queue = build_queue()
    job = build_job(build_work(1), build_work(2))
    queue.add(job)
    image = job.images[1]
    pixels = weakref.ref(image._file.data)
    assert pixels() is not None
    if by == "leaving":
        queue.remove(job)
    else:
        queue.finish(job, image, DONE)
    assert pixels() is None


async def test_a_request_that_leaves_while_its_image_is_opened() -> None:
    queue = build_queue()
    job = build_job(build_work(1, 2))
    queue.add(job)
    assert queue.pick() is not None
    image = job.images[0]
    image.open()
    queue.remove(job)
    assert queue.opened(job, image) == 0
    assert queue.pick() is None and queue.pick_active() is None


async def test_a_client_that_comes_back_has_a_burst_again() -> None:
    queue = build_queue()
    other = build_job(build_work(*range(1, 241)), client="other")
    queue.add(other)
    settle(queue, other, canvases=50)
    for _ in range(3):
        job = build_job(build_work(*range(1, BURST + 1)), client="back")
        queue.add(job)
        served = pick_all(queue, BURST + 4)
        assert served.count(job) == BURST
        queue.remove(job)


async def test_finishing_tells_when_the_request_is_finished() -> None:
    queue = build_queue()
    job = build_job(build_work(1), build_work(2))
    queue.add(job)
    pick_all(queue, 2)
    first, second = job.images
    assert queue.finish(job, first, DONE) == (False, 16)
    assert queue.finish(job, first, Outcome(b"other")) == (False, 0)
    assert first.outcome is DONE
    assert queue.finish(job, second, DONE) == (True, 16)


async def test_an_image_that_fails_has_no_more_canvases() -> None:
    queue = build_queue()
    job = build_job(build_work(1, 2, 3), build_work(4))
    queue.add(job)
    _, image, _ = pick(queue)
    assert queue.finish(job, image, DONE)[0] is False
    assert pick(queue)[1] is job.images[1]
    assert queue.pick() is None and queue.pick_active() is None


async def test_helpers_take_canvases_of_opened_images_alone() -> None:
    queue = build_queue()
    job = build_job(build_work(1, 2, 3), build_work(4))
    queue.add(job)
    assert queue.pick_active() is None
    _, image, _ = pick(queue)
    before = job.burst, queue._tenants[job.tenant].tag
    assert queue.pick_active() == (job, image, 1)
    assert job.burst < before[0] and queue._tenants[job.tenant].tag > before[1]  # it is charged
    assert queue.pick_active() == (job, image, 2)
    assert queue.pick_active() is None
    assert pick(queue)[1] is job.images[1]


async def test_images_wait_until_the_pixels_of_others_are_given_back() -> None:
    budget = PixelBudget(64)  # a large image holds more than 4 px; half is 32
    queue = build_queue(budget)
    jobs = [build_job(build_work(1, 2), client=name) for name in "abc"]
    for job in jobs:
        queue.add(job)
    _, first, _ = pick(queue)
    assert pick(queue)[1] is first
    assert queue.pick() is None
    budget.release(queue.release(first), "a")
    assert queue.release(first) == 0
    _, second, _ = pick(queue)
    assert second is jobs[1].images[0]
    assert pick(queue)[1] is second
    assert queue.pick() is None
    queue.remove(jobs[2])
    budget.release(queue.release(second), "b")
    assert queue.pick() is None
    assert budget.held == 0


async def test_the_budget_is_asked_again_only_after_a_release() -> None:
    class Full(PixelBudget):
        asked = 0

        def take(self, pixels: int, client: str) -> bool:
            self.asked += 1
            return False

    budget = Full()
    queue = build_queue(budget)
    for name in "ab":
        queue.add(build_job(build_work(1), client=name))
    assert [queue.pick() for _ in range(5)] == [None] * 5
    assert budget.asked == 2
    budget.generation += 1
    assert queue.pick() is None and budget.asked == 4


async def test_an_image_with_fewer_canvases_than_admitted_is_done_when_it_is_opened() -> None:
    queue = build_queue()
    job = build_job(build_work(1), build_work(2))
    job.images[0].canvases = 3
    queue.add(job)
    assert pick(queue)[1] is job.images[0]
    assert list(job.pending) == [job.images[1]]
    assert pick(queue)[1] is job.images[1]
    assert queue.pick() is None and queue.pick_active() is None


async def test_a_release_while_requests_are_found_to_be_blocked_is_not_missed() -> None:
    class Racing(PixelBudget):
        """Another thread gives pixels back just after the first request was refused."""

        refusals = 2

        def take(self, pixels: int, client: str) -> bool:
            self.refusals -= 1
            if self.refusals == 1:
                self.generation += 1
                return False
            return self.refusals < 0 and super().take(pixels, client)

    queue = build_queue(Racing())
    for name in "ab":
        queue.add(build_job(build_work(1), client=name))
    assert queue.pick() is None
    assert pick_all(queue, 2)


async def test_the_last_canvas_post_processed_is_told() -> None:
    queue = build_queue()
    job = build_job(build_work(1, 2))
    (image,) = job.images
    assert [queue.searched(job, image), queue.searched(job, image)] == [False, True]
    assert job.progress.done == 2
