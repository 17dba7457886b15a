from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.jobs.records import JobFile
from service.jobs.retention import LEAST_S, Retention
from service.jobs.store import JobStore
from tests.support.jobs import OK, accept, finish_all

KEEP_S = 10 * LEAST_S


class Clocks:
    """Wall clock and monotonic clock."""

    wall_s = 1e9
    now_s = 0.0

    def pass_by(self, seconds: float) -> None:
        self.wall_s += seconds
        self.now_s += seconds


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def store(tmp_path: Path, clocks: Clocks) -> Iterator[JobStore]:
    opened = JobStore(tmp_path, 10**6, lambda: clocks.wall_s)
    yield opened
    opened.close()


def build(clocks: Clocks, max_bytes: int = 10**6) -> Retention:
    return Retention(KEEP_S, max_bytes, lambda: clocks.wall_s, lambda: clocks.now_s)


def test_jobs_are_deleted_when_they_are_old(store: JobStore, clocks: Clocks) -> None:
    retention, job = build(clocks), accept(store)
    finish_all(store)
    waiting = accept(store)
    assert retention.apply(store) == []
    clocks.pass_by(KEEP_S - 1)
    assert retention.apply(store) == []
    clocks.pass_by(1)
    assert retention.apply(store) == [job.id]
    clocks.pass_by(100 * KEEP_S)
    assert retention.apply(store) == []
    assert [found.id for found in store.list_jobs("ann", 9)] == [waiting.id]


def test_a_jump_of_the_clock_deletes_nothing_at_once(store: JobStore, clocks: Clocks) -> None:
    retention, job = build(clocks), accept(store)
    finish_all(store)
    assert retention.apply(store) == []
    clocks.wall_s += 100 * KEEP_S
    assert retention.apply(store) == []
    assert build(clocks).apply(store) == []  # nor does a process that has just started
    clocks.now_s += LEAST_S
    assert retention.apply(store) == [job.id]


def test_a_clock_that_goes_back_only_keeps_jobs_longer(store: JobStore, clocks: Clocks) -> None:
    retention = build(clocks)
    accept(store)
    finish_all(store)
    retention.apply(store)
    clocks.pass_by(KEEP_S)
    clocks.wall_s -= 100 * KEEP_S
    assert retention.apply(store) == []


def test_the_largest_owner_loses_its_earliest_jobs_first(store: JobStore, clocks: Clocks) -> None:
    small = accept(store, owner="bob")
    large = [accept(store) for _ in range(3)]
    finish_all(store)
    waiting = accept(store, [JobFile("a", data=bytes(300))])
    sizes = {job.id: store.find(job.owner, job.id).bytes for job in (small, *large)}
    retention = build(clocks, store.count_bytes() - 1)
    assert retention.apply(store) == []
    clocks.pass_by(LEAST_S)
    assert retention.apply(store) == [large[0].id]
    assert retention.apply(store) == []
    assert retention.apply(store, needed=sizes[large[1].id]) == [large[1].id]
    assert store.find("bob", small.id) and store.find("ann", waiting.id)


def test_jobs_whose_webhook_waits_are_kept(store: JobStore, clocks: Clocks) -> None:
    retention, job = build(clocks), accept(store, webhook="http://x/")
    store.finish("w", store.claim("w", 1)[0], OK)
    retention.apply(store)
    clocks.pass_by(2 * KEEP_S)
    assert retention.apply(store) == []
    store.note_webhook("w", store.claim_webhooks("w")[0], None, last=False)
    retention.apply(store)
    clocks.pass_by(LEAST_S)
    assert retention.apply(store) == [job.id]
