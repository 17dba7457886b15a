"""What requests for jobs and their answers look like."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.http.job_results import ResultFormat
from service.http.schemas import SegmentQuery
from service.jobs.records import JobRecord, State, WebhookState

NOT_OF_JOBS = ("priority", "timeout_ms", "format", "simplify_px")
"""The results are read later, in a format that is chosen then."""
_MOST_INPUTS = 1000
_MOST_URI = 4096


class JobParameters(SegmentQuery):
    """Parameters of POST /v2/jobs: those of POST /segment but for priority, deadline and format."""

    webhook: Annotated[
        str | None,
        Field(description="URL that gets a signed POST when the job is done"),
    ] = None

    @model_validator(mode="after")
    def _has_what_jobs_have(self) -> Self:
        for name in NOT_OF_JOBS:
            if name in self.model_fields_set:
                raise ValueError(f"a job has no {name}")
        return self


class JobBody(JobParameters):
    """Body of POST /v2/jobs that names files of the server or of an object store."""

    inputs: Annotated[
        list[Annotated[str, Field(max_length=_MOST_URI)]],
        Field(
            min_length=1,
            max_length=_MOST_INPUTS,
            description="URIs of files, folders (recursive) and globs",
            examples=[["file:///data/images/", "s3://bucket/scans/*.png"]],
        ),
    ]


class JobListQuery(BaseModel):
    """Query of GET /v2/jobs."""

    model_config = ConfigDict(extra="forbid")

    limit: Annotated[int, Field(ge=1, le=1000)] = 100
    before: Annotated[
        str | None, Field(description="goes on after this job: `next` of the last answer")
    ] = None


class ResultQuery(BaseModel):
    """Query of GET /v2/jobs/{id}/results."""

    model_config = ConfigDict(extra="forbid")

    format: Annotated[
        ResultFormat,
        Field(
            description="json, ndjson: entries as of POST /segment; coco-results: what pycocotools "
            "loads; others: as `format` of POST /segment"
        ),
    ] = "json"
    simplify_px: Annotated[
        float,
        Field(ge=0, le=100, description="outlines of the format may be off so far; 0 is exact"),
    ] = 0.0


class JobFilesModel(BaseModel):
    """How far a job is."""

    total: int
    done: Annotated[int, Field(description="with a result")]
    failed: Annotated[int, Field(description="with an error, which the results have")]
    in_progress: int


class JobWebhookModel(BaseModel):
    """What became of a job's webhook."""

    url: str
    state: Annotated[WebhookState, Field(description="empty until the job is done")]
    attempts: int
    error: Annotated[str, Field(description="of the last attempt")]


class JobModel(BaseModel):
    """A job."""

    id: str
    state: State
    model: str
    version: int | None
    parameters: dict[str, Any]
    created: datetime
    finished: datetime | None
    files: JobFilesModel
    served: Annotated[
        dict[str, int], Field(description="files by the model:version that processed them")
    ]
    webhook: JobWebhookModel | None
    left_out: Annotated[
        list[str] | None,
        Field(description="in the answer to POST: entries of folders that are no images"),
    ] = None


class JobList(BaseModel):
    """Answer of GET /v2/jobs, the latest first."""

    jobs: list[JobModel]
    next: Annotated[str | None, Field(description="`before` of the next request")]


def build_job_model(job: JobRecord, left_out: list[str] | None = None) -> JobModel:
    """A job as answers show it."""
    options = job.options
    webhook = None
    if options.webhook is not None:
        webhook = JobWebhookModel(
            url=options.webhook,
            state=job.webhook_state,
            attempts=job.webhook_attempts,
            error=job.webhook_error,
        )
    return JobModel(
        id=job.id,
        state=job.state,
        model=options.model,
        version=options.version,
        parameters=dict(options.parameters),
        created=datetime.fromtimestamp(job.created_s, UTC),
        finished=None if job.finished_s is None else datetime.fromtimestamp(job.finished_s, UTC),
        files=JobFilesModel(
            total=job.files, done=job.done, failed=job.failed, in_progress=job.taken
        ),
        served=dict(job.served),
        webhook=webhook,
        left_out=left_out,
    )
