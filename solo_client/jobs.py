"""Jobs of the server (POST /v2/jobs): requests as arguments of httpx, and what answers say."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from solo_client.answer import MISFITS, not_ours, read_result
from solo_client.errors import ImageFailed
from solo_client.images import ImageInput
from solo_client.request import Options, build_parts, build_query
from solo_client.result import Result

POLL_S = 2.0
"""Longest time between two looks at a job."""


@dataclass(frozen=True)
class JobStatus:
    """How far a job is.

    Attributes:
        id: Its id.
        state: "queued", "running" or "done".
        total: Files.
        done: Files with a result.
        failed: Files with an error.
        content: All that the server says of it.
    """

    id: str
    state: str
    total: int
    done: int
    failed: int
    content: Mapping[str, Any]

    @property
    def is_done(self) -> bool:
        """Whether its results can be read."""
        return self.state == "done"


def build_submission(
    images: Iterable[ImageInput],
    inputs: Sequence[str],
    webhook: str | None,
    idempotency_key: str | None,
    options: Options,
) -> dict[str, Any]:
    """POST /v2/jobs; a key is made if there is none, so that a retry makes no second job.

    Raises:
        TypeError: An unknown option, or an image of an unsupported type.
        ValueError: There are both images and inputs, or neither.
        OSError: An image cannot be read.
    """
    query = build_query(options)
    if webhook is not None:
        query["webhook"] = webhook
    headers = {"idempotency-key": idempotency_key or uuid.uuid4().hex}
    request: dict[str, Any] = {"method": "POST", "url": "/v2/jobs", "headers": headers}
    if isinstance(inputs, str):
        raise TypeError(f"inputs are a list of URIs, not {inputs!r:.100}")
    parts = build_parts(images)[1]
    if bool(parts) == bool(inputs):
        raise ValueError("a job has either images, which are sent, or inputs, which are named")
    if parts:
        return {**request, "params": query, "files": parts}
    return {**request, "params": query, "json": {"inputs": list(inputs)}}


def build_job_request(job_id: str, end: str = "", method: str = "GET") -> dict[str, Any]:
    """A request for a job."""
    return {"method": method, "url": f"/v2/jobs/{quote(job_id, safe='')}{end}"}


def read_status(content: Any, url: str) -> JobStatus:
    """The status of a job.

    Raises:
        UnexpectedAnswer: The content is none.
    """
    try:
        files = content["files"]
        return JobStatus(
            str(content["id"]),
            str(content["state"]),
            int(files["total"]),
            int(files["done"]),
            int(files["failed"]),
            content,
        )
    except MISFITS as error:
        raise not_ours(url, content, error) from error


def read_statuses(content: Any, url: str) -> tuple[list[JobStatus], str | None]:
    """A page of the list of jobs, and where the next one begins."""
    try:
        return [read_status(job, url) for job in content["jobs"]], content["next"]
    except MISFITS as error:
        raise not_ours(url, content, error) from error


def check_time(job: JobStatus, began_s: float, timeout_s: float | None) -> None:
    """Raises TimeoutError if a job that is not done has been waited for too long.

    Args:
        job: Its last status.
        began_s: Monotonic time.
        timeout_s: Longest wait; None: no bound.
    """
    if timeout_s is not None and time.monotonic() - began_s >= timeout_s:
        finished = job.done + job.failed
        raise TimeoutError(
            f"job {job.id} is not done after {timeout_s:g} s: {finished} of {job.total} files"
        )


def read_job_results(content: Any, url: str) -> list[Result | ImageFailed]:
    """The results of a job's files, in their order.

    Raises:
        UnexpectedAnswer: The content has none.
    """
    try:
        return [_read_entry(index, entry) for index, entry in enumerate(content["results"])]
    except MISFITS as error:
        raise not_ours(url, content, error) from error


def _read_entry(index: int, entry: Mapping[str, Any]) -> Result | ImageFailed:
    common = {
        "model": str(entry.get("model", "")),
        "version": int(entry.get("version", 0)),
        "task": str(entry.get("task", "segmentation")),
        "timing_ms": {},
    }
    return read_result(index, entry["file_name"], entry, common)
