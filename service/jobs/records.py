"""What is known of a job of the server, and of a file that a worker has taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["queued", "running", "done"]
WebhookState = Literal["", "waiting", "delivered", "failed"]
"""Empty if there is none."""


@dataclass(frozen=True)
class JobFile:
    """A file of a job that is submitted.

    Attributes:
        name: In the results.
        source: URI under an allowed root; None for an upload.
        data: The upload.
    """

    name: str
    source: str | None = None
    data: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What a job asks for; all of it is JSON.

    Attributes:
        model, version: As the request named them.
        parameters: Of `RequestOptions`.
        client: Fields of the `ClientProfile` that its canvases count for.
        webhook: URL that is told when the job is done.
        classes: The model's, `category_id` and `name` of each.
    """

    model: str
    version: int | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    client: Mapping[str, Any] = field(default_factory=dict)
    webhook: str | None = None
    classes: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job that is submitted.

    Attributes:
        id: Its id, unless the idempotency key is that of an earlier job.
        owner: Who may see it.
        idempotency: The client's name for the submission; None: it has none.
        fingerprint: Of all that was sent; differs if a key is used for something else.
        options: What is asked for.
        files: At least one.
    """

    id: str
    owner: str
    idempotency: str | None
    fingerprint: str
    options: JobOptions
    files: Sequence[JobFile]


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """A job as it is stored.

    Attributes:
        seq: Its number in the store; later jobs have higher ones.
        id: Its name in the API.
        owner: Who may see it.
        options: What was asked for.
        created_s, finished_s: Times of the wall clock.
        files, done, failed: All files, those with a result, those with an error.
        taken: Files that workers are processing.
        bytes: Of its uploads and results.
        served: How many files each "model:version" has processed.
        webhook_state, webhook_attempts, webhook_error: Of its webhook.
    """

    seq: int
    id: str
    owner: str
    options: JobOptions
    created_s: float
    finished_s: float | None
    files: int
    done: int
    failed: int
    taken: int
    bytes: int
    served: Mapping[str, int]
    webhook_state: WebhookState
    webhook_attempts: int
    webhook_error: str

    @property
    def state(self) -> State:
        """`running` from the first file that is taken on."""
        if self.finished_s is not None:
            return "done"
        return "running" if self.done or self.failed or self.taken else "queued"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A file, or the webhook of a job, that one worker has taken.

    Attributes:
        seq: The job.
        job: Its id.
        options: What the job asks for.
        number: The file's, from 1; 0 is the webhook.
        name: The file's in the results.
        source: Its URI; None for an upload.
        attempts: How often it was taken, this time included.
    """

    seq: int
    job: str
    options: JobOptions
    number: int
    name: str
    source: str | None
    attempts: int

    @property
    def place(self) -> tuple[int, int]:
        """Job and number, which identify it."""
        return self.seq, self.number


@dataclass(frozen=True)
class FileResult:
    """What became of a file.

    Attributes:
        served: "model:version" that processed it; empty if it failed.
        properties: Entry of the answer of POST /segment without its instances; or its error.
        instances: COCO results without image_id.
    """

    served: str
    properties: Mapping[str, Any]
    instances: Sequence[Mapping[str, Any]] = ()

    @property
    def failed(self) -> bool:
        """Whether it has an error in place of a result."""
        return "error" in self.properties
