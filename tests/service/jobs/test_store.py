from __future__ import annotations

import multiprocessing
import resource
import stat
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import orjson
import pytest

from service.errors import IdempotencyKeyReused, QuotaExceeded, StorageFull, UnknownJob
from service.jobs.database import JournalDiffers, JournalFull
from service.jobs.records import FileResult, JobFile
from service.jobs.store import FILE_NAME, JobStore
from tests.support.jobs import FAILED, OK, accept, build_submission, finish_all, numbers_of

MOST = 10**9


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    opened = JobStore(tmp_path / "jobs", MOST)
    yield opened
    opened.close()


def test_a_job_goes_from_queued_to_done(store: JobStore) -> None:
    job = accept(store, 2)
    assert (job.state, job.files, job.done) == ("queued", 2, 0)
    claims = store.claim("w", 1)
    assert [(claim.number, claim.name, claim.attempts) for claim in claims] == [(1, "1.png", 1)]
    assert store.read_upload(claims[0]) == b"data 1"
    assert store.find("ann", job.id).state == "running"
    assert store.finish("w", claims[0], OK)
    assert store.read_upload(claims[0]) is None
    assert store.find("ann", job.id).state == "running"
    finish_all(store, result=FAILED)
    done = store.find("ann", job.id)
    assert (done.state, done.done, done.failed, done.taken) == ("done", 1, 1, 0)
    assert done.served == {"m:1": 1}
    assert done.finished_s is not None
    results = list(store.iterate_results(job.id))
    assert [number for number, _, _ in results] == [1, 2]
    assert orjson.loads(results[0][2]) == [{"score": 0.5}]
    assert orjson.loads(results[1][1])["error"]["code"] == "corrupt_image"
    assert store.claim("w", 10) == []


def test_the_folder_is_made_for_this_user_alone(store: JobStore, tmp_path: Path) -> None:
    assert stat.S_IMODE((tmp_path / "jobs").stat().st_mode) == 0o700


def test_what_is_stored_is_there_after_reopening(tmp_path: Path) -> None:
    store = JobStore(tmp_path, MOST)
    job = accept(store, 3, webhook="http://x/", parameters={"score_threshold": 0.5})
    first = store.claim("w", 1)[0]
    store.finish("w", first, OK)
    store.close()
    again = JobStore(tmp_path, MOST)
    found = again.find("ann", job.id)
    assert (found.done, found.files) == (1, 3)
    assert found.options.parameters == {"score_threshold": 0.5}
    assert found.options.webhook == "http://x/"
    assert len(finish_all(again)) == 2
    assert numbers_of(again, job) == [1, 2, 3]
    again.close()


def test_an_idempotency_key_makes_one_job_of_each_owner(store: JobStore) -> None:
    first, is_new = store.accept(build_submission(idempotency="k"), None)
    again, is_new_again = store.accept(build_submission(idempotency="k"), None)
    assert (is_new, is_new_again) == (True, False)
    assert again.id == first.id
    other, _ = store.accept(build_submission(idempotency="k", owner="bob"), None)
    assert other.id != first.id
    with pytest.raises(IdempotencyKeyReused, match=f"'k' is that of job {first.id}"):
        store.accept(build_submission(idempotency="k", fingerprint="other"), None)
    assert len(store.list_jobs("ann", 10)) == 1
    assert accept(store).id != accept(store).id  # without a key each is a job


def test_jobs_of_another_owner_do_not_exist(store: JobStore) -> None:
    job = accept(store)
    for act in (store.find, lambda owner, name: store.list_jobs(owner, 5, name)):
        with pytest.raises(UnknownJob, match=f"no job '{job.id}'"):
            act("bob", job.id)
    assert store.list_jobs("bob", 10) == []


def test_the_list_goes_on_after_a_job(store: JobStore) -> None:
    ids = [accept(store).id for _ in range(5)][::-1]
    assert [job.id for job in store.list_jobs("ann", 2)] == ids[:2]
    assert [job.id for job in store.list_jobs("ann", 9, ids[1])] == ids[2:]


def test_owners_and_jobs_take_turns(store: JobStore) -> None:
    jobs = [accept(store, 20), accept(store, 20), accept(store, 4, owner="bob")]
    names = dict(zip([job.id for job in jobs], ["ann 1", "ann 2", "bob"], strict=True))
    order = [names[store.claim("w", 1)[0].job] for _ in range(8)]
    assert Counter(order) == {"ann 1": 2, "ann 2": 2, "bob": 4}
    together = Counter(names[claim.job] for claim in store.claim("w", 12))
    assert together == {"ann 1": 6, "ann 2": 6}


def test_a_file_that_was_taken_often_comes_last(store: JobStore) -> None:
    accept(store, 3)
    for _ in range(2):
        assert store.claim("w", 1)[0].number in (1, 2)
        assert store.release_workers(["w"]) == 1
    assert [(c.number, c.attempts) for c in store.claim("w", 3)] == [(3, 1), (1, 2), (2, 2)]


def test_what_is_given_back_does_not_count_as_an_attempt(store: JobStore) -> None:
    accept(store, 2)
    claims = store.claim("w", 2)
    store.release("w", claims)
    assert [claim.attempts for claim in store.claim("v", 2)] == [1, 1]
    store.release("w", claims)  # they are another's now
    assert store.claim("w", 2) == []


def test_only_the_worker_that_has_a_file_finishes_it_and_once(store: JobStore) -> None:
    job = accept(store, 1)
    (claim,) = store.claim("slow", 1)
    assert store.release_workers(["slow"]) == 1
    (taken,) = store.claim("quick", 1)
    assert not store.finish("slow", claim, OK)
    assert store.finish("quick", taken, FAILED)
    assert not store.finish("quick", taken, OK)
    found = store.find("ann", job.id)
    assert (found.done, found.failed) == (0, 1)
    assert numbers_of(store, job) == [1]


def test_a_beat_tells_what_is_still_held(store: JobStore) -> None:
    job = accept(store, 2)
    claims = store.claim("w", 2)
    before = store.read_beats()
    assert store.beat("w") == {claim.place for claim in claims}
    assert store.read_beats()["w"] != before["w"]
    store.delete(store.find("ann", job.id))
    assert store.beat("w") == set()
    assert store.read_beats() == {}


def test_a_deleted_job_is_gone_and_its_work_discarded(store: JobStore) -> None:
    job, other = accept(store, 3, idempotency="k"), accept(store, 1)
    first, second = store.claim("w", 10)[:2]
    assert first.job == job.id
    store.finish("w", first, OK)
    store.delete(job)
    assert not store.finish("w", second, OK) or second.job == other.id
    assert numbers_of(store, job) == []
    with pytest.raises(UnknownJob):
        store.find("ann", job.id)
    assert store.accept(build_submission(idempotency="k"), None)[1]
    assert store.find("ann", other.id).files == 1


def test_results_that_are_read_do_not_change_when_the_job_is_deleted(store: JobStore) -> None:
    job = accept(store, 50)
    finish_all(store)
    results = store.iterate_results(job.id)
    assert next(results)[0] == 1
    store.delete(job)
    assert [number for number, _, _ in results] == list(range(2, 51))


def test_webhooks_come_when_the_job_is_done(store: JobStore) -> None:
    job = accept(store, 1, webhook="http://x/")
    accept(store, 1)
    assert store.claim_webhooks("w") == ()
    finish_all(store)
    (hook,) = store.claim_webhooks("w")
    assert (hook.job, hook.number) == (job.id, 0)
    assert store.claim_webhooks("v") == []
    assert store.note_webhook("w", hook, "status 500", last=False)
    found = store.find("ann", job.id)
    assert (found.webhook_state, found.webhook_attempts) == ("waiting", 1)
    assert found.webhook_error == "status 500"
    assert store.list_finished() != [] and job.id not in [j.id for j in store.list_finished()]
    assert store.note_webhook("w", hook, None, last=False)
    assert not store.note_webhook("w", hook, None, last=False)
    assert store.find("ann", job.id).webhook_state == "delivered"
    assert store.claim_webhooks("w") == ()


def test_the_webhook_of_a_lost_worker_is_taken_by_another(store: JobStore) -> None:
    job = accept(store, 1, webhook="http://x/")
    finish_all(store)
    (hook,) = store.claim_webhooks("w")
    store.release_workers(["w"])
    (again,) = store.claim_webhooks("v")
    assert not store.note_webhook("w", hook, None, last=False)
    assert store.note_webhook("v", again, "no", last=True)
    assert store.find("ann", job.id).webhook_state == "failed"


def test_unfinished_files_of_an_owner_are_bounded(store: JobStore) -> None:
    store.accept(build_submission(3), 4)
    with pytest.raises(QuotaExceeded, match="would have 5 unfinished files, the key allows 4"):
        store.accept(build_submission(2), 4)
    store.accept(build_submission(4, owner="bob"), 4)
    store.finish("w", store.claim("w", 1)[0], OK)
    store.accept(build_submission(1), 4)


def test_bytes_are_counted_and_bounded(tmp_path: Path) -> None:
    store = JobStore(tmp_path, 1000)
    job = accept(store, [JobFile("a", data=bytes(900))])
    assert store.count_bytes() == 900
    with pytest.raises(StorageFull, match="would have 1100 bytes, the limit is 1000"):
        accept(store, [JobFile("a", data=bytes(200))])
    finish_all(store)
    assert 0 < store.count_bytes() < 200  # the upload is gone
    accept(store, [JobFile("a", data=bytes(200))])
    store.delete(job)
    assert store.count_bytes() == 200
    store.close()


def test_ten_thousand_files(store: JobStore) -> None:
    files = [JobFile(f"{n}.png", f"file:///images/{n}.png") for n in range(10_000)]
    job = accept(store, files)
    assert store.count_open() == (1, 10_000)
    claims = store.claim("w", 5)
    assert [claim.source for claim in claims] == [file.source for file in files[:5]]
    store.delete(job)
    assert store.count_open() == (0, 0)


def process(folder: Path, worker: str) -> list[int]:
    """A worker process: takes files until there are none."""
    store = JobStore(folder, MOST)
    done = []
    while claims := store.claim(worker, 3):
        for claim in claims:
            if store.finish(worker, claim, FileResult(f"{worker}:1", {"file_name": claim.name})):
                done.append(claim.number)
    store.close()
    return done


def test_processes_share_the_files(tmp_path: Path) -> None:
    store = JobStore(tmp_path, MOST)
    job = accept(store, 60)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(3, context) as pool:
        parts = [*pool.map(process, [tmp_path] * 3, ["a", "b", "c"])]
    assert sorted(number for part in parts for number in part) == list(range(1, 61))
    assert numbers_of(store, job) == list(range(1, 61))
    found = store.find("ann", job.id)
    assert (found.state, found.done) == ("done", 60)
    assert sum(found.served.values()) == 60
    store.close()


def test_a_full_disk_changes_nothing(store: JobStore, tmp_path: Path) -> None:
    job = accept(store, 1)
    (claim,) = store.claim("w", 1)
    size = (tmp_path / "jobs" / f"{FILE_NAME}-wal").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = FileResult("m:1", {"file_name": "x" * 100_000})
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
    try:
        with pytest.raises(JournalFull, match=r"jobs\.sqlite"):
            store.finish("w", claim, large)
        with pytest.raises(JournalFull):
            accept(store, [JobFile("a", data=bytes(100_000))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(store.list_jobs("ann", 10)) == 1
    assert store.finish("w", claim, large)
    assert numbers_of(store, job) == [1]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    store = JobStore(tmp_path, MOST)
    accept(store, 50)
    store.close()
    (tmp_path / FILE_NAME).write_bytes(b"nonsense" * 1000)
    with pytest.raises(JournalDiffers, match=r"jobs\.sqlite is not a journal"):
        JobStore(tmp_path, MOST)
    assert (tmp_path / FILE_NAME).read_bytes().startswith(b"nonsense")
