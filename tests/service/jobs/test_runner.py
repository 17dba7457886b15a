from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import orjson
import pytest

from service.errors import (
    EngineError,
    EngineRestarting,
    JobsUnavailable,
    Overloaded,
    ProcessLost,
    QuotaExceeded,
    SourceBusy,
    TooManyCanvases,
    UnknownModel,
)
from service.jobs import leases, runner
from service.jobs.records import JobFile, JobRecord
from service.jobs.runner import MAX_ATTEMPTS, JobRunner
from service.jobs.service import JobService
from service.jobs.store import JobStore
from service.observe.metrics import Metrics
from service.protocol import Segmenter
from service.settings import Settings
from service.work.admission import Admission
from service.work.request import Outcome, RequestOptions
from tests.support.jobs import OK, build_submission
from tests.support.waiting import wait_until


class FakeSegmenter:
    """Answers with what `answers` gives, then with a result.

    Attributes:
        answers: Errors to raise, or to put into the outcome if they are an `EngineError`.
        go: Images wait for it.
        asked: Names of the images.
    """

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.admission = Admission(100)
        self.answers: list[Exception | None] = []
        self.go = asyncio.Event()
        self.go.set()
        self.asked: list[str] = []
        self.options: list[RequestOptions] = []

    @contextmanager
    def use(self, name: str, version: int | None, client: Any) -> Iterator[Any]:
        config = type("Config", (), {"task": "segmentation"})
        yield type("Model", (), {"name": name, "version": 1, "config": config})

    async def segment(
        self, model: Any, images: Any, options: Any, client: Any, progress: Any
    ) -> Any:
        self.asked.append(images[0].file_name)
        self.options.append(options)
        await self.go.wait()
        error = self.answers.pop(0) if self.answers else None
        if error is not None and not isinstance(error, EngineError):
            raise error
        entry: dict[str, Any] = {"file_name": images[0].file_name}
        if error is None:
            entry["instances"] = [{"score": 0.5}]
        else:
            entry["error"] = {"code": "engine_error", "message": "no"}
        outcome = Outcome(orjson.dumps(entry), error=error)
        return type("Segmented", (), {"outcomes": [outcome], "model": model})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLL_S", "RETRY_S", "BEAT_S"):
        monkeypatch.setattr(runner, name, 0.02)
    monkeypatch.setattr(leases, "LEASE_S", 0.5)


@pytest.fixture
def segmenter() -> FakeSegmenter:
    return FakeSegmenter()


@pytest.fixture
async def service(tmp_path: Path, segmenter: FakeSegmenter) -> AsyncIterator[JobService]:
    opened = JobService(Settings(jobs_dir=tmp_path / "jobs"), segmenter.metrics)
    yield opened
    await opened.close()


@pytest.fixture
async def running(service: JobService, segmenter: FakeSegmenter) -> AsyncIterator[JobRunner]:
    started = JobRunner(service, cast(Segmenter, segmenter), 2)
    started.start()
    yield started
    await started.stop()


async def submit(
    service: JobService, files: int | Sequence[JobFile] = 1, **fields: Any
) -> JobRecord:
    return (await service.accept(build_submission(files, **fields), None))[0]


async def finish(service: JobService, job: JobRecord) -> list[dict[str, Any]]:
    """The entries of a job when it is done."""
    async with asyncio.timeout(20):
        while (await service.call(lambda s: s.find(job.owner, job.id))).state != "done":
            await asyncio.sleep(0.01)
    stored = await service.call(lambda s: list(s.iterate_results(job.id)))
    return [orjson.loads(properties) for _, properties, _ in stored]


async def test_every_file_is_processed_once_as_background_work(
    service: JobService, segmenter: FakeSegmenter, running: JobRunner
) -> None:
    job = await submit(service, 7, parameters={"max_instances": 3})
    entries = await finish(service, job)
    assert [entry["file_name"] for entry in entries] == [f"{n}.png" for n in range(1, 8)]
    assert sorted(segmenter.asked) == sorted(entry["file_name"] for entry in entries)
    assert {(o.priority, o.max_instances) for o in segmenter.options} == {("background", 3)}


@pytest.mark.parametrize(
    "error",
    [
        Overloaded("busy", "queue_canvases"),
        QuotaExceeded("too many", "key_rate", 0),
        EngineRestarting("being rebuilt"),
        EngineError("failed"),
    ],
)
async def test_what_passes_is_waited_for(
    service: JobService, segmenter: FakeSegmenter, running: JobRunner, error: Exception
) -> None:
    segmenter.answers = [error, error]
    (entry,) = await finish(service, await submit(service))
    assert "error" not in entry
    assert len(segmenter.asked) == 3


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UnknownModel("gone"), "unknown_model"),
        (TooManyCanvases("large"), "too_many_canvases"),
        (RuntimeError("secret detail"), "internal_error"),
    ],
)
async def test_what_does_not_pass_is_the_files_result(
    service: JobService, segmenter: FakeSegmenter, running: JobRunner, error: Exception, code: str
) -> None:
    segmenter.answers = [error]
    entries = await finish(service, await submit(service, 2))
    assert [entry["error"]["code"] for entry in entries if "error" in entry] == [code]
    assert "secret" not in str(entries)


async def test_a_file_on_which_the_engine_always_fails_has_an_error(
    service: JobService, segmenter: FakeSegmenter, running: JobRunner
) -> None:
    segmenter.answers = [EngineError("no")] * runner.ENGINE_TRIES
    (entry,) = await finish(service, await submit(service))
    assert entry["error"]["code"] == "engine_error"


async def test_a_file_that_ends_the_process_is_given_up(
    service: JobService, segmenter: FakeSegmenter
) -> None:
    job = await submit(service)
    for _ in range(MAX_ATTEMPTS):
        await service.call(lambda s: s.claim("dead", 1))
        await service.call(lambda s: s.release_workers(["dead"]))
    started = JobRunner(service, cast(Segmenter, segmenter), 2)
    started.start()
    (entry,) = await finish(service, job)
    assert entry["error"]["code"] == "process_lost"
    assert segmenter.asked == []
    await started.stop()


async def test_a_file_that_ends_other_processes_goes_last_and_is_given_up(
    service: JobService, segmenter: FakeSegmenter
) -> None:
    job = await submit(service, 2)
    segmenter.answers = [ProcessLost("gone"), None, *[ProcessLost("gone")] * (MAX_ATTEMPTS - 1)]
    started = JobRunner(service, cast(Segmenter, segmenter), 1)
    started.start()
    first, second = await finish(service, job)
    assert first["error"] == {"code": "process_lost", "message": "gone"}
    assert "error" not in second
    assert segmenter.asked == ["1.png", "2.png", *["1.png"] * (MAX_ATTEMPTS - 1)]
    await started.stop()


@pytest.mark.parametrize(
    ("failures", "code"), [(3, None), (MAX_ATTEMPTS - 1, None), (1000, "source_unavailable")]
)
async def test_a_file_whose_store_does_not_answer_waits_for_it(
    service: JobService,
    segmenter: FakeSegmenter,
    monkeypatch: pytest.MonkeyPatch,
    failures: int,
    code: str | None,
) -> None:
    asked = []

    async def read(source: str) -> bytes:
        asked.append(source)
        if source == "s3://busy" and asked.count(source) <= failures:
            raise SourceBusy("no answer")
        return b"data"

    monkeypatch.setattr(service, "read_file", read)
    monkeypatch.setattr(runner, "RETRY_S", 0.001)
    job = await submit(service, [JobFile(name, f"s3://{name}") for name in ("busy", "well")])
    started = JobRunner(service, cast(Segmenter, segmenter), 1)
    started.start()
    busy, well = await finish(service, job)
    assert busy.get("error", {}).get("code") == code and "error" not in well
    assert asked[:2] == ["s3://busy", "s3://well"]  # others go first
    assert asked.count("s3://busy") == min(failures + 1, MAX_ATTEMPTS)
    await started.stop()


async def test_files_of_a_worker_that_died_are_taken_over(
    service: JobService, segmenter: FakeSegmenter, running: JobRunner
) -> None:
    segmenter.go.clear()
    await submit(service, 2)  # keeps the runner busy
    await wait_until(lambda: len(segmenter.asked) == 2)
    job = await submit(service, 2)
    assert len(await service.call(lambda s: s.claim("dead", 5))) == 2
    segmenter.go.set()
    entries = await finish(service, job)
    assert len(entries) == 2 and not any("error" in entry for entry in entries)


async def test_work_that_another_has_taken_over_is_dropped(
    service: JobService, segmenter: FakeSegmenter, running: JobRunner
) -> None:
    segmenter.go.clear()
    job = await submit(service)
    await wait_until(lambda: len(segmenter.asked) == 1)
    own = next(iter(await service.call(JobStore.read_beats)))
    assert await service.call(lambda s: s.release_workers([own])) == 1
    (claim,) = await service.call(lambda s: s.claim("other", 1))
    await wait_until(lambda: not running._files)
    segmenter.go.set()
    assert await service.call(lambda s: s.finish("other", claim, OK))
    assert len(await finish(service, job)) == 1


async def test_stopping_gives_everything_back(
    service: JobService, segmenter: FakeSegmenter
) -> None:
    started = JobRunner(service, cast(Segmenter, segmenter), 2)
    started.start()
    segmenter.go.clear()
    await submit(service, 3)
    await wait_until(lambda: len(segmenter.asked) == 2)
    segmenter.admission.close()
    await wait_until(lambda: started._task is not None and started._task.done())
    claims = await service.call(lambda s: s.claim("next", 5))
    assert [(claim.number, claim.attempts) for claim in claims] == [(1, 1), (2, 1), (3, 1)]
    await started.stop()


async def test_results_wait_for_a_store_that_cannot_be_used(
    service: JobService,
    segmenter: FakeSegmenter,
    running: JobRunner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failures = [1] * 3
    real = JobStore.finish

    def finish_later(self: JobStore, *arguments: Any) -> bool:
        if failures:
            failures.pop()
            raise OSError("no space")
        return real(self, *arguments)

    monkeypatch.setattr(JobStore, "finish", finish_later)
    entries = await finish(service, await submit(service))
    assert not failures and len(entries) == 1
    assert len(segmenter.asked) == 1  # the result was kept
    with pytest.raises(JobsUnavailable, match="jobs: no space"):
        await service.call(raise_os_error)


def raise_os_error(store: JobStore) -> None:
    raise OSError("no space")


async def test_room_is_made_for_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.jobs.retention.LEAST_S", 0.0)
    settings = Settings(jobs_dir=tmp_path, jobs_max_bytes=50)
    service = JobService(settings, Metrics())
    first = await submit(service)
    await service.call(lambda s: s.finish("w", s.claim("w", 1)[0], OK))
    assert await service.call(JobStore.count_bytes) > 44  # no room for an upload of 6
    await submit(service)
    found = await service.call(lambda s: s.list_jobs("ann", 9))
    assert first.id not in [job.id for job in found] and len(found) == 1
    await service.close()
