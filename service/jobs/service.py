"""The jobs of a server for its event loop: the store in a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeVar

from service.background import run_in_thread
from service.errors import JobsUnavailable, StorageFull
from service.jobs.database import JournalError, JournalFull
from service.jobs.listing import Listing
from service.jobs.records import JobFile, JobRecord, Submission
from service.jobs.retention import Retention
from service.jobs.sources import Sources
from service.jobs.store import JobStore
from service.jobs.webhook import build_webhooks
from service.observe.metrics import Metrics
from service.settings import Settings

T = TypeVar("T")
LISTINGS = 4
"""Submissions whose files are looked for at once."""


class JobService:
    """What routes and workers use of the store.

    The store is opened by the first call; if it cannot be, the next call tries again. A damaged
    store stops jobs, but nothing else.

    Args:
        settings: With `jobs_dir`.
        metrics: Where faults of the store are counted.

    Attributes:
        webhooks: Those that are allowed.
        on_accepted: Called when a job was accepted.

    Raises:
        StartupError: A setting is wrong.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        assert settings.jobs_dir is not None
        self._sources = Sources(settings.jobs_roots, settings.max_body_bytes)
        self.webhooks = build_webhooks(
            settings.jobs_webhook_secret.get_secret_value(),
            settings.jobs_webhook_hosts,
            allow_private=settings.jobs_webhook_private,
        )
        self.on_accepted: Callable[[], None] = lambda: None
        self._folder = settings.jobs_dir
        self._max_bytes = settings.jobs_max_bytes
        self._retention = Retention(settings.jobs_keep_s, settings.jobs_max_bytes)
        self._metrics = metrics
        self._store: JobStore | None = None
        self._thread = ThreadPoolExecutor(1, "jobs")
        self._listings = asyncio.Semaphore(LISTINGS)

    async def call(self, function: Callable[[JobStore], T]) -> T:
        """Runs a function in the store's thread.

        Raises:
            JobsUnavailable: The store cannot be used.
            StorageFull: The disk is full.
            ServiceError: From the function.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, function)

    def _run(self, function: Callable[[JobStore], T]) -> T:
        try:
            return function(self._open())
        except JournalFull as error:
            self._metrics.jobs.store_errors.inc()
            raise StorageFull(str(error)) from error
        except (JournalError, OSError) as error:
            self._metrics.jobs.store_errors.inc()
            raise JobsUnavailable(f"jobs: {error}") from error

    def _open(self) -> JobStore:
        if self._store is None:
            self._store = JobStore(self._folder, self._max_bytes)
        return self._store

    async def list_files(self, inputs: Sequence[str]) -> tuple[list[JobFile], Listing]:
        """The files that inputs name, in a thread of its own; raises as `Sources.list_files`."""
        async with self._listings:
            return await run_in_thread(partial(self._sources.list_files, inputs))

    async def read_file(self, source: str) -> bytes:
        """The content of a file, read in a thread of its own; raises as `Sources.read`."""
        return await run_in_thread(partial(self._sources.read, source))

    async def accept(
        self, submission: Submission, max_open_files: int | None
    ) -> tuple[JobRecord, bool]:
        """Stores a job, see `JobStore.accept`; makes room for it first if that is needed."""
        accept = partial(JobStore.accept, submission=submission, max_open_files=max_open_files)
        try:
            accepted = await self.call(accept)
        except StorageFull:
            if not await self.expire(sum(len(file.data or b"") for file in submission.files)):
                raise
            accepted = await self.call(accept)
        self.on_accepted()
        return accepted

    async def expire(self, needed: int = 0) -> list[str]:
        """Deletes jobs that are done and due; returns their ids."""
        return await self.call(lambda store: self._retention.apply(store, needed))

    async def close(self) -> None:
        """Closes the store after the calls that are in progress."""

        def close() -> None:
            if self._store is not None:
                with suppress(JournalError):
                    self._store.close()

        await asyncio.get_running_loop().run_in_executor(self._thread, close)
        self._thread.shutdown(wait=False)
