"""Processes the files of jobs in one process, and delivers their webhooks."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, TypeVar

import orjson

from pipeline.errors import DecodeError
from service.errors import (
    Draining,
    EngineError,
    EngineRestarting,
    JobsUnavailable,
    ModelUnavailable,
    Overloaded,
    ProcessLost,
    QuotaExceeded,
    ServiceError,
    SourceBusy,
    SourceUnavailable,
    StorageFull,
    describe_error,
)
from service.jobs.leases import BEAT_S, LeaseWatch
from service.jobs.records import Claim, FileResult, JobRecord
from service.jobs.service import JobService
from service.jobs.store import JobStore
from service.jobs.webhook import ATTEMPTS, NotDelivered, wait_s
from service.observe.rare import RareWarning
from service.protocol import Segmenter
from service.work.request import ClientProfile, ImageFile, RequestOptions, RequestProgress

T = TypeVar("T")
logger = logging.getLogger(__name__)

POLL_S = 1.0
"""Time between two looks for jobs that other processes have accepted."""
RETRY_S = 2.0
"""Before something is tried again that will pass: a busy server, a full disk."""
EXPIRE_S = 60.0
"""Time between two looks for jobs to delete."""
MAX_ATTEMPTS = 10
"""How often a file is taken: by processes that end, or while its store does not answer."""
ENGINE_TRIES = 3
_WEBHOOKS_AT_ONCE = 8
_PASSING = (Overloaded, QuotaExceeded, EngineRestarting, ModelUnavailable, Draining)
"""Errors that the file has nothing to do with."""
_LATER = (ProcessLost, SourceBusy)
"""Errors after which a file is tried again, a bounded number of times."""


class JobRunner:
    """Takes files from the store as long as the segmenter admits work.

    Args:
        service: The store.
        segmenter: Processes the images.
        in_flight: Images at once.
    """

    def __init__(self, service: JobService, segmenter: Segmenter, in_flight: int) -> None:
        self._service = service
        self._segmenter = segmenter
        self._in_flight = in_flight
        self._worker = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(6)}"
        self._watch = LeaseWatch(self._worker)
        self._held: dict[tuple[int, int], Claim] = {}
        self._working: dict[tuple[int, int], asyncio.Task[None]] = {}
        self._files: set[asyncio.Task[None]] = set()
        self._webhooks: set[asyncio.Task[None]] = set()
        self._sending = asyncio.Semaphore(_WEBHOOKS_AT_ONCE)
        self._wake = asyncio.Event()
        self._open = (0, 0, 0)
        self._warn = RareWarning(logger)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins; needs a running event loop."""
        self._service.on_accepted = self._wake.set
        self._task = asyncio.get_running_loop().create_task(self._run(), name="jobs")
        metrics = self._segmenter.metrics
        metrics.follow(metrics.jobs.open, lambda: self._open[0])
        metrics.follow(metrics.jobs.files_open, lambda: self._open[1])
        metrics.follow(metrics.jobs.bytes, lambda: self._open[2])
        metrics.follow(metrics.jobs.files_in_flight, lambda: len(self._files))

    async def stop(self) -> None:
        """Stops what is in progress and gives it back: another process, or the next, takes it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        """Until admission is closed."""
        closed = asyncio.ensure_future(self._segmenter.admission.closed.wait())
        ticks = asyncio.ensure_future(self._tick())
        try:
            while not closed.done():
                self._wake.clear()
                await self._take()
                woken = asyncio.ensure_future(self._wake.wait())
                waited = {closed, woken, *self._files}
                await asyncio.wait(waited, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
                woken.cancel()
        finally:
            closed.cancel()
            ticks.cancel()
            await self._give_back()

    async def _take(self) -> None:
        """Starts the work on as many files as there is room for."""
        free = self._in_flight - len(self._files)
        try:
            hooks = await self._service.call(lambda s: s.claim_webhooks(self._worker))
            claims = await self._service.call(lambda s: s.claim(self._worker, free)) if free else []
        except (JobsUnavailable, StorageFull) as error:
            self._warn("no files of jobs are processed: %s", error)
            return
        except Exception:  # whatever it is, the next look may succeed
            logger.exception("no files of jobs are processed")
            await asyncio.sleep(RETRY_S)
            return
        for claim in hooks:
            self._begin(claim, self._deliver, self._webhooks)
        for claim in claims:
            self._begin(claim, self._process, self._files)

    def _begin(
        self, claim: Claim, work: Callable[[Claim], Any], tasks: set[asyncio.Task[None]]
    ) -> None:
        task = asyncio.get_running_loop().create_task(work(claim))
        self._held[claim.place] = claim
        self._working[claim.place] = task
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def _give_back(self) -> None:
        tasks = [*self._files, *self._webhooks]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        claims = tuple(self._held.values())
        with suppress(JobsUnavailable, StorageFull):  # then it is found to be lost
            await self._service.call(lambda store: store.release(self._worker, claims))

    # --- regularly ------------------------------------------------------------------------------

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        expired_s = loop.time() - EXPIRE_S
        while True:
            try:
                await self._check_leases()
                if loop.time() - expired_s >= EXPIRE_S:
                    expired_s = loop.time()
                    if expired := await self._service.expire():
                        logger.info("jobs deleted, as they were done long ago: %s", expired)
                self._open = await self._service.call(
                    lambda store: (*store.count_open(), store.count_bytes())
                )
            except (JobsUnavailable, StorageFull) as error:
                self._warn("jobs: %s", error)
            except Exception:
                logger.exception("jobs cannot be watched")
            await asyncio.sleep(BEAT_S)

    async def _check_leases(self) -> None:
        """Shows that this worker lives; finds what it has lost, and workers that do not live."""
        known = dict(self._working)
        if self._held:
            held = await self._service.call(lambda store: store.beat(self._worker))
            for place, task in known.items():
                if place not in held and self._working.get(place) is task:
                    task.cancel()  # the job was deleted, or another worker has the file
                    self._held.pop(place, None)
        beats = await self._service.call(JobStore.read_beats)
        if lost := self._watch.find_lost(beats):
            count = await self._service.call(lambda store: store.release_workers(lost))
            logger.warning("%d files of jobs are taken from %s, which has ended", count, lost)
            self._wake.set()

    # --- files ----------------------------------------------------------------------------------

    async def _process(self, claim: Claim) -> None:
        try:
            result = await self._find_result(claim)
        except _LATER as error:  # other files go first, see `JobStore.claim`
            logger.warning("file %d of job %s: %s", claim.number, claim.job, error)
            await asyncio.sleep(RETRY_S * claim.attempts)
            await self._insist(lambda store: store.release(self._worker, [claim], is_attempt=True))
            self._held.pop(claim.place, None)
            return
        finally:
            self._working.pop(claim.place, None)
        stored = await self._insist(lambda store: store.finish(self._worker, claim, result))
        self._held.pop(claim.place, None)
        if stored:
            state = "failed" if result.failed else "done"
            self._segmenter.metrics.jobs.files.labels(state).inc()

    async def _insist(self, function: Callable[[JobStore], T]) -> T:
        """Calls the store, again and again while it cannot be used: no result is lost."""
        while True:
            try:
                return await self._service.call(function)
            except (JobsUnavailable, StorageFull) as error:
                self._warn("jobs wait, their store cannot be used: %s", error)
            await asyncio.sleep(RETRY_S)

    async def _find_result(self, claim: Claim) -> FileResult:
        """Processes a file; whatever is wrong with it becomes its result.

        Raises:
            ProcessLost: Another process, which had the file, has ended.
            SourceBusy: It cannot be read now.
        """
        if claim.attempts > MAX_ATTEMPTS:
            lost = f"{MAX_ATTEMPTS} times the server ended before the file was processed"
            return _build_failure(claim, ProcessLost(lost))
        try:
            return await self._segment(claim, await self._read(claim))
        except Exception as error:
            if isinstance(error, _LATER) and claim.attempts < MAX_ATTEMPTS:
                raise
            if not isinstance(error, (ServiceError, DecodeError)):
                logger.exception("file %d of job %s failed", claim.number, claim.job)
            return _build_failure(claim, error)

    async def _read(self, claim: Claim) -> bytes:
        if claim.source is not None:
            return await self._service.read_file(claim.source)
        data = await self._insist(lambda store: store.read_upload(claim))
        if data is None:
            raise SourceUnavailable("the upload is not there any more")
        return data

    async def _segment(self, claim: Claim, data: bytes) -> FileResult:
        """Processes an image; waits as long as the server cannot take it."""
        options = RequestOptions(**{**claim.options.parameters, "priority": "background"})
        client = ClientProfile(**claim.options.client)
        segmenter, tries = self._segmenter, 0
        while True:
            try:
                with segmenter.use(claim.options.model, claim.options.version, client) as model:
                    segmented = await segmenter.segment(
                        model, [ImageFile(claim.name, data)], options, client, RequestProgress()
                    )
            except _PASSING as error:
                waits_s = getattr(error, "retry_after_s", RETRY_S)
                await asyncio.sleep(waits_s)
                continue
            (outcome,) = segmented.outcomes
            tries += 1
            if isinstance(outcome.error, EngineError) and tries < ENGINE_TRIES:
                await asyncio.sleep(RETRY_S)
                continue
            entry, state = orjson.loads(outcome.payload), segmented.model
            if outcome.error is not None:
                return FileResult("", entry)
            instances = entry.pop("instances")
            entry |= {"model": state.name, "version": state.version, "task": state.config.task}
            return FileResult(f"{state.name}:{state.version}", entry, instances)

    # --- webhooks -------------------------------------------------------------------------------

    async def _deliver(self, claim: Claim) -> None:
        try:
            while (pause_s := await self._try_to_deliver(claim)) is not None:
                await asyncio.sleep(pause_s)
        finally:
            self._working.pop(claim.place, None)
        self._held.pop(claim.place, None)

    async def _try_to_deliver(self, claim: Claim) -> float | None:
        """Makes one attempt; returns the seconds until the next, None if there is none."""
        job = await self._insist(lambda store: store.read_job(claim))
        if job is None or claim.options.webhook is None:
            return None
        attempt, problem = job.webhook_attempts + 1, None
        webhooks, body = self._service.webhooks, describe_event(job)
        try:
            async with self._sending:
                await webhooks.send(claim.options.webhook, job.id, body)
        except NotDelivered as error:
            problem = str(error)
            logger.warning("webhook of job %s, attempt %d: %s", job.id, attempt, problem)
        result = "delivered" if problem is None else "failed"
        self._segmenter.metrics.jobs.webhooks.labels(result).inc()
        last = attempt >= ATTEMPTS
        kept = await self._insist(
            lambda store: store.note_webhook(self._worker, claim, problem, last=last)
        )
        return wait_s(attempt) if kept and problem is not None and not last else None


def _build_failure(claim: Claim, error: Exception) -> FileResult:
    _, detail = describe_error(error)
    return FileResult("", {"file_name": claim.name, "error": detail})


def describe_event(job: JobRecord) -> bytes:
    """Body of a webhook."""
    finished = datetime.fromtimestamp(job.finished_s or 0, UTC).isoformat()
    files = {"total": job.files, "done": job.done, "failed": job.failed}
    data = {"id": job.id, "state": job.state, "files": files, "finished": finished}
    return orjson.dumps({"type": "job.done", "timestamp": finished, "data": data})
