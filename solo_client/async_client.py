"""The client for event loops."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Any, Self, Unpack

import httpx

from solo_client.answer import (
    AnswerParser,
    OnProgress,
    blame_image,
    only_result,
    read_file,
    read_model,
    read_models,
    read_results,
)
from solo_client.connections import FAILURES, ConnectionPool, Connections
from solo_client.errors import ImageFailed, ServerError
from solo_client.images import ImageInput
from solo_client.jobs import (
    POLL_S,
    JobStatus,
    build_job_request,
    build_submission,
    check_time,
    read_job_results,
    read_status,
    read_statuses,
)
from solo_client.request import (
    MODELS,
    READY,
    Options,
    build_description,
    build_file_request,
    build_request,
)
from solo_client.result import Result, ResultFile


class AsyncClient(Connections[httpx.AsyncClient, asyncio.Semaphore, httpx.AsyncBaseTransport]):
    """The methods of `Client` as coroutines; closed by `async with` or `close`.

    Cancelling a call closes its connection; the server then drops the work. Files are read and
    arrays are encoded in a thread. Several event loops may use a client, e.g. of several calls of
    `asyncio.run`; each has connections of its own.
    """

    _http_class = httpx.AsyncClient
    _slots_class = asyncio.Semaphore

    @property
    def _http(self) -> httpx.AsyncClient:
        return self._open_here().http

    def _open_here(self) -> ConnectionPool[httpx.AsyncClient, asyncio.Semaphore]:
        """The pool of the running event loop; drops the pools of loops that are closed."""
        loop = asyncio.get_running_loop()
        if loop not in self._pools:
            for other in list(self._pools):
                if isinstance(other, asyncio.AbstractEventLoop) and other.is_closed():
                    self._pools.pop(other, None)
        return self._open(loop)

    async def segment(
        self,
        image: ImageInput,
        *,
        on_progress: OnProgress | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """Segments one image; `on_progress` is called in the event loop and must not block."""
        return only_result(await self.segment_many([image], on_progress=on_progress, **options))

    async def segment_many(
        self,
        images: Iterable[ImageInput],
        *,
        on_progress: OnProgress | None = None,
        **options: Unpack[Options],
    ) -> list[Result | ImageFailed]:
        """Segments several images in one request; a result or an error for each of them."""
        async with self._open_here().slots:
            names, request = await asyncio.to_thread(build_request, images, options)
            if not names:
                return []
            try:
                return read_results(await self._ask(request, on_progress), names, self.url)
            except ServerError as error:
                return blame_image(error, names)

    async def segment_to_file(
        self,
        images: Iterable[ImageInput],
        format: str,
        *,
        on_progress: OnProgress | None = None,
        **options: Unpack[Options],
    ) -> ResultFile:
        """Segments images into a file of another program, which the server writes."""
        async with self._open_here().slots:
            request = await asyncio.to_thread(build_file_request, images, format, options)
            return read_file(await self._ask(request, on_progress), self.url)

    async def submit_job(
        self,
        images: Iterable[ImageInput] = (),
        *,
        inputs: Sequence[str] = (),
        webhook: str | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[Options],
    ) -> JobStatus:
        """Makes a job, whose results are read later."""
        async with self._open_here().slots:
            arguments = (images, inputs, webhook, idempotency_key, options)
            request = await asyncio.to_thread(build_submission, *arguments)
            return read_status(await self._ask(request), self.url)

    async def show_job(self, job_id: str) -> JobStatus:
        """How far a job is."""
        return read_status(await self._ask(build_job_request(job_id)), self.url)

    async def list_jobs(self) -> list[JobStatus]:
        """All jobs of this client, the latest first."""
        jobs, params = list[JobStatus](), dict[str, str]()
        while True:
            request = {"method": "GET", "url": "/v2/jobs", "params": params}
            page, after = read_statuses(await self._ask(request), self.url)
            jobs += page
            if after is None:
                return jobs
            params = {"before": after}

    async def wait_for_job(self, job_id: str, *, timeout_s: float | None = None) -> JobStatus:
        """Waits until a job is done; raises TimeoutError if it is not in time."""
        began_s, pause_s = time.monotonic(), POLL_S / 16
        while not (job := await self.show_job(job_id)).is_done:
            check_time(job, began_s, timeout_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, POLL_S)
        return job

    async def read_job(self, job_id: str) -> list[Result | ImageFailed]:
        """The results of a job that is done: for each file its result or its error."""
        return read_job_results(await self._ask(build_job_request(job_id, "/results")), self.url)

    async def delete_job(self, job_id: str) -> None:
        """Stops a job and deletes it."""
        await self._ask(build_job_request(job_id, method="DELETE"))

    async def list_models(self) -> list[dict[str, Any]]:
        """Name, state and version of every model of the server."""
        return read_models(await self._ask(MODELS), self.url)

    async def describe_model(self, name: str, version: int | None = None) -> dict[str, Any]:
        """A model's card, classes and settings: the answer of GET /v2/models/{name}."""
        return read_model(await self._ask(build_description(name, version)), self.url)

    async def is_ready(self) -> bool:
        """Whether the server accepts work; False if it cannot be reached. Does not retry."""
        try:
            return (await self._http.request(**READY)).is_success
        except httpx.RequestError:
            return False

    async def _ask(self, request: dict[str, Any], on_progress: OnProgress | None = None) -> Any:
        attempt = 0
        while True:
            attempt += 1
            answer: AnswerParser | None = None
            try:
                async with self._http.stream(**request) as response:
                    answer = AnswerParser(response, on_progress)
                    async for chunk in response.aiter_bytes():
                        answer.feed(chunk)
                return answer.finish()
            except FAILURES as error:
                wait_s = self._wait_s(error, answer, attempt)
            await asyncio.sleep(wait_s)

    async def close(self) -> None:
        """Closes the client and its connections of this event loop."""
        pool = self._end().get(asyncio.get_running_loop())
        if pool is not None:
            await pool.http.aclose()

    async def __aenter__(self) -> Self:
        self._open_here()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
