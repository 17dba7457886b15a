"""The client for threads."""

from __future__ import annotations

import threading
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
from solo_client.connections import FAILURES, Connections
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


class Client(Connections[httpx.Client, threading.Semaphore, httpx.BaseTransport]):
    """A client that several threads and forked processes may use; closed by `with` or `close`.

    Args:
        url: Address of the server, e.g. http://localhost:8000. The proxy is taken from HTTP_PROXY,
            HTTPS_PROXY, ALL_PROXY and NO_PROXY when the client is created.
        api_key: Sent as X-API-Key.
        timeout_s: Bounds connecting, and each wait for the server to send something; None: no
            bound. While it works on a request it sends its progress at least every 5 s, so a large
            image does not time out. An older server, and a proxy that collects the answer, send
            nothing before the result. The wait for a free connection of this client is not bounded.
        retry: When a request is sent again.
        transport: Transport of httpx, for tests and special networks; such a client cannot be
            pickled, or used in a forked process or another event loop.

    Raises:
        ValueError: An argument, or a variable that names a proxy or certificates, is invalid.
    """

    _http_class = httpx.Client
    _slots_class = threading.Semaphore

    @property
    def _http(self) -> httpx.Client:
        return self._open().http

    def segment(
        self,
        image: ImageInput,
        *,
        on_progress: OnProgress | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """Segments one image.

        Args:
            image: A path, a file's bytes, an open file, a PIL image or an array (`ImageInput`).
            on_progress: Called when the request is admitted, when canvases are finished, and
                at least every 5 s. A retry starts again at 0. An exception from it ends the
                request. An older server reports nothing.
            **options: Fields of `Options`.

        Raises:
            ImageFailed: The server cannot segment the image.
            SoloError: Any other failure (`solo_client.errors`).
            OSError, TypeError, ValueError: The image cannot be sent.
        """
        return only_result(self.segment_many([image], on_progress=on_progress, **options))

    def segment_many(
        self,
        images: Iterable[ImageInput],
        *,
        on_progress: OnProgress | None = None,
        **options: Unpack[Options],
    ) -> list[Result | ImageFailed]:
        """Segments several images in one request; their canvases are counted together.

        Returns:
            For each image, in their order, its result or its error.

        Raises:
            SoloError: The whole request failed.
            OSError, TypeError, ValueError: An image cannot be sent.
        """
        with self._open().slots:
            names, request = build_request(images, options)
            if not names:
                return []
            try:
                return read_results(self._ask(request, on_progress), names, self.url)
            except ServerError as error:
                return blame_image(error, names)

    def segment_to_file(
        self,
        images: Iterable[ImageInput],
        format: str,
        *,
        on_progress: OnProgress | None = None,
        **options: Unpack[Options],
    ) -> ResultFile:
        """Segments images into a file of another program, which the server writes.

        Args:
            images: Of several some formats make a ZIP.
            format: E.g. "geojson" or "csv".
            on_progress: As of `segment`.
            **options: Fields of `Options`.

        Raises:
            SoloError: The request failed, or one of its images.
            OSError, TypeError, ValueError: An image cannot be sent.
        """
        with self._open().slots:
            request = build_file_request(images, format, options)
            return read_file(self._ask(request, on_progress), self.url)

    def submit_job(
        self,
        images: Iterable[ImageInput] = (),
        *,
        inputs: Sequence[str] = (),
        webhook: str | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[Options],
    ) -> JobStatus:
        """Makes a job, whose results are read later.

        Args:
            images: They are sent.
            inputs: URIs of files, folders and globs that the server reads, in place of images.
            webhook: URL that gets a signed POST when the job is done.
            idempotency_key: Names the job, if another call may submit it again; default: a
                random one, so that retries of this call make one job.
            **options: Fields of `Options`.

        Raises:
            SoloError: The job was not accepted.
            OSError, TypeError, ValueError: An image cannot be sent.
        """
        with self._open().slots:
            request = build_submission(images, inputs, webhook, idempotency_key, options)
            return read_status(self._ask(request), self.url)

    def show_job(self, job_id: str) -> JobStatus:
        """How far a job is."""
        return read_status(self._ask(build_job_request(job_id)), self.url)

    def list_jobs(self) -> list[JobStatus]:
        """All jobs of this client, the latest first."""
        jobs, params = list[JobStatus](), dict[str, str]()
        while True:
            request = {"method": "GET", "url": "/v2/jobs", "params": params}
            page, after = read_statuses(self._ask(request), self.url)
            jobs += page
            if after is None:
                return jobs
            params = {"before": after}

    def wait_for_job(self, job_id: str, *, timeout_s: float | None = None) -> JobStatus:
        """Waits until a job is done.

        Args:
            job_id: The job.
            timeout_s: Longest wait; None: no bound.

        Raises:
            TimeoutError: It is not done in time.
            SoloError: The server cannot be asked, or has no such job.
        """
        began_s, pause_s = time.monotonic(), POLL_S / 16
        while not (job := self.show_job(job_id)).is_done:
            check_time(job, began_s, timeout_s)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, POLL_S)
        return job

    def read_job(self, job_id: str) -> list[Result | ImageFailed]:
        """The results of a job that is done: for each file its result or its error."""
        return read_job_results(self._ask(build_job_request(job_id, "/results")), self.url)

    def delete_job(self, job_id: str) -> None:
        """Stops a job and deletes it."""
        self._ask(build_job_request(job_id, method="DELETE"))

    def list_models(self) -> list[dict[str, Any]]:
        """Name, state and version of every model of the server."""
        return read_models(self._ask(MODELS), self.url)

    def describe_model(self, name: str, version: int | None = None) -> dict[str, Any]:
        """A model's card, classes and settings: the answer of GET /v2/models/{name}.

        Raises:
            SoloError: The server has no such model or version, or the request failed.
        """
        return read_model(self._ask(build_description(name, version)), self.url)

    def is_ready(self) -> bool:
        """Whether the server accepts work; False if it cannot be reached. Does not retry."""
        try:
            return self._http.request(**READY).is_success
        except httpx.RequestError:
            return False

    def _ask(self, request: dict[str, Any], on_progress: OnProgress | None = None) -> Any:
        attempt = 0
        while True:
            attempt += 1
            answer: AnswerParser | None = None
            try:
                with self._http.stream(**request) as response:
                    answer = AnswerParser(response, on_progress)
                    for chunk in response.iter_bytes():
                        answer.feed(chunk)
                return answer.finish()
            except FAILURES as error:
                wait_s = self._wait_s(error, answer, attempt)
            time.sleep(wait_s)

    def close(self) -> None:
        """Closes the client and its connections."""
        for pool in self._end().values():
            pool.http.close()

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
