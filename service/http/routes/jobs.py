"""Jobs: POST and GET /v2/jobs, GET and DELETE /v2/jobs/{id}, GET /v2/jobs/{id}/results."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, TypeVar, cast

import orjson
from fastapi import APIRouter, Depends, Header, Query, Request, Response
from pydantic import ValidationError
from starlette.responses import StreamingResponse

from pipeline.strict_json import parse_json
from service.errors import Draining, InvalidParameter, InvalidRequest, JobNotFinished, JobsDisabled
from service.http.body import check_encoding, read_body
from service.http.explain import explain_errors
from service.http.form import PART_NAME, read_form
from service.http.job_results import build_answer
from service.http.job_schemas import (
    NOT_OF_JOBS,
    JobBody,
    JobList,
    JobListQuery,
    JobModel,
    JobParameters,
    ResultQuery,
    build_job_model,
)
from service.http.oip.schemas import ProtocolError, inline_schema
from service.http.routes.documents import FILE_TYPES, describe_name
from service.http.routes.segment import NDJSON, split_query
from service.http.routes.state import ClientDep, KeyDep, SegmenterDep
from service.jobs.records import JobFile, JobOptions, JobRecord, Submission
from service.jobs.service import JobService
from service.protocol import ModelState
from service.work.request import ClientProfile, ImageFile, RequestOptions

P = TypeVar("P", bound=JobParameters)
router = APIRouter(tags=["jobs"])

_MAX_JSON_BYTES = 4 * 1024 * 1024
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_OPTIONS = {field.name for field in fields(RequestOptions)} - {"overlay", *NOT_OF_JOBS}
_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}}
_SCHEMA = {
    name: schema
    for name, schema in JobParameters.model_json_schema()["properties"].items()
    if name not in NOT_OF_JOBS
}
_REQUEST_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": [PART_NAME],
                    "properties": {PART_NAME: _FILES, **_SCHEMA},
                }
            },
            "application/json": {"schema": inline_schema(JobBody)},
        },
    }
}


def _failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    texts = {
        400: "The request cannot be understood",
        401: "An API key is needed",
        403: "A file or webhook that the settings do not allow",
        404: "The client has no such job; or no such model",
        409: "The job is not done",
        413: "Too many bytes or files",
        422: "A parameter or an input is not valid",
        429: "The API key's limits are used up; see Retry-After",
        501: "The server has no folder for jobs",
        503: "Going down, or the folder for jobs cannot be used",
        507: "There is no room for another job",
    }
    return {s: {"model": ProtocolError, "description": texts[s]} for s in statuses}


_COMMON = (401, 404, 501, 503)


async def get_jobs(request: Request) -> JobService:
    """The application's jobs.

    Raises:
        JobsDisabled: It has none.
    """
    jobs = cast(JobService | None, request.app.state.jobs)
    if jobs is None:
        raise JobsDisabled("the server has no jobs; it must be started with --jobs-dir")
    return jobs


async def get_owner(key: KeyDep) -> str:
    """Whose jobs a request sees: those of its API key; without keys there is one owner."""
    return "" if key is None else f"key {key.name}"


JobsDep = Annotated[JobService, Depends(get_jobs)]
OwnerDep = Annotated[str, Depends(get_owner)]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="names the submission: if it is sent again, the job is not made twice",
    ),
]


@router.post(
    "/v2/jobs",
    status_code=202,
    openapi_extra=_REQUEST_BODY,
    responses={
        200: {"model": JobModel, "description": "The job that this idempotency key has made"},
        **_failures(400, 401, 403, 404, 413, 422, 429, 501, 503, 507),
    },
)
async def submit(
    request: Request,
    response: Response,
    segmenter: SegmenterDep,
    client: ClientDep,
    key: KeyDep,
    owner: OwnerDep,
    jobs: JobsDep,
    idempotency_key: IdempotencyKey = None,
) -> JobModel:
    """Makes a job of uploads (parts named `images`), or of files that the server can read (JSON).

    ```sh
    image=tests/data/nuclei/images/16c3d5935ba94b72.jpg
    curl --fail-with-body -F images=@$image -F images=@$image localhost:8000/v2/jobs
    ```
    """
    if len(request.headers.getlist("idempotency-key")) > 1:
        raise InvalidParameter("Idempotency-Key: it is given more than once")
    if idempotency_key is not None and not _KEY.fullmatch(idempotency_key):
        raise InvalidParameter("Idempotency-Key: 1 to 255 printable ASCII characters are needed")
    if not segmenter.admission.is_open:
        raise Draining("the server is going down")
    settings = request.app.state.settings
    sent = await read_submission(request, settings.jobs_max_files)
    fingerprint = await asyncio.to_thread(sent.fingerprint)
    # First, as files and models may be gone since the job was made.
    earlier = await jobs.call(lambda s: s.find_earlier(owner, idempotency_key, fingerprint))
    if earlier is not None:
        return answer_job(response, earlier, is_new=False)
    if sent.parameters.webhook is not None:
        jobs.webhooks.check(sent.parameters.webhook)
    model = segmenter.find(sent.parameters.model, sent.parameters.version)
    options = build_options(sent.parameters, model, client)
    files, left_out = sent.files, None
    if sent.inputs:
        files, listing = await segmenter.admission.unless_closed(jobs.list_files(sent.inputs))
        left_out = listing.describe_left_out()
        if len(files) > settings.jobs_max_files:
            raise InvalidParameter(
                f"inputs: there are {len(files)} files, a job may have {settings.jobs_max_files}"
            )
    submission = Submission(
        id=secrets.token_hex(16),
        owner=owner,
        idempotency=idempotency_key,
        fingerprint=fingerprint,
        options=options,
        files=files,
    )
    job, is_new = await jobs.accept(submission, None if key is None else key.max_job_files)
    return answer_job(response, job, left_out, is_new=is_new)


def answer_job(
    response: Response, job: JobRecord, left_out: list[str] | None = None, *, is_new: bool
) -> JobModel:
    """The answer to a submission."""
    response.status_code = 202 if is_new else 200
    response.headers["location"] = f"/v2/jobs/{job.id}"
    return build_job_model(job, left_out)


@router.get("/v2/jobs", responses=_failures(401, 404, 422, 501, 503))
async def list_jobs(
    query: Annotated[JobListQuery, Query()], owner: OwnerDep, jobs: JobsDep
) -> JobList:
    """The client's jobs, the latest first.

    ```sh
    curl --fail-with-body localhost:8000/v2/jobs
    ```
    """
    found = await jobs.call(lambda store: store.list_jobs(owner, query.limit, query.before))
    return JobList(
        jobs=[build_job_model(job) for job in found],
        next=found[-1].id if len(found) == query.limit else None,
    )


@router.get("/v2/jobs/{job_id}", responses=_failures(*_COMMON))
async def show_job(job_id: str, owner: OwnerDep, jobs: JobsDep) -> JobModel:
    """How far a job is."""
    return build_job_model(await jobs.call(lambda store: store.find(owner, job_id)))


@router.get(
    "/v2/jobs/{job_id}/results",
    response_class=StreamingResponse,
    responses={
        200: {
            "content": {kind: {} for kind in ("application/json", NDJSON, *FILE_TYPES)},
            "description": "Results",
        },
        **_failures(*_COMMON, 409, 422),
    },
)
async def read_results(
    job_id: str, query: Annotated[ResultQuery, Query()], owner: OwnerDep, jobs: JobsDep
) -> Response:
    """The results of a job that is done, in the order of its files."""
    job = await jobs.call(lambda store: store.find(owner, job_id))
    if job.finished_s is None:
        finished = job.done + job.failed
        raise JobNotFinished(f"{finished} of {job.files} files of job {job.id} are finished")
    store = await jobs.call(lambda store: store)
    answer = build_answer(
        job, lambda: store.iterate_results(job.id), query.format, query.simplify_px
    )
    headers = {}
    if answer.file_name is not None:
        headers["content-disposition"] = f"attachment; {describe_name(answer.file_name)}"
    return StreamingResponse(answer.pieces, headers=headers, media_type=answer.media_type)


@router.delete("/v2/jobs/{job_id}", status_code=204, responses=_failures(*_COMMON))
async def delete_job(job_id: str, owner: OwnerDep, jobs: JobsDep) -> None:
    """Stops a job, and deletes it with its results."""
    await jobs.call(lambda store: store.delete(store.find(owner, job_id)))


def build_options(
    parameters: JobParameters, model: ModelState, client: ClientProfile
) -> JobOptions:
    """What is stored of a job's parameters.

    Raises:
        InvalidParameter: The model cannot do what is asked for.
    """
    asked = {
        name: value
        for name, value in parameters.model_dump(exclude_unset=True).items()
        if name in _OPTIONS
    }
    RequestOptions(**asked).adapt(model.config)  # else every file would fail
    bounds = {"weight": client.weight, "canvases_per_minute": client.canvases_per_minute}
    return JobOptions(
        model=model.name,
        version=parameters.version,
        parameters=asked,
        client={"name": f"jobs of {client.name}", **bounds},
        webhook=parameters.webhook,
        classes=[spec.model_dump(include={"category_id", "name"}) for spec in model.config.classes],
    )


class SentJob:
    """What a request says of its job.

    Args:
        parameters: Validated.
        files: Uploads.
        inputs: URIs.
    """

    def __init__(
        self, parameters: JobParameters, files: Sequence[JobFile], inputs: Sequence[str]
    ) -> None:
        self.parameters = parameters
        self.files = files
        self.inputs = inputs

    def fingerprint(self) -> str:
        """Differs between requests that ask for different things."""
        files = [[file.name, hashlib.sha256(file.data or b"").hexdigest()] for file in self.files]
        asked = self.parameters.model_dump(exclude_unset=True, exclude={"inputs"})
        content = [files, list(self.inputs), asked]
        return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


async def read_submission(request: Request, max_files: int) -> SentJob:
    """Reads the body of POST /v2/jobs.

    Raises:
        InvalidRequest: It is neither a form nor JSON, or cannot be read as such.
        InvalidParameter: A parameter is wrong, or given twice.
        TooManyImages: The form has too many files.
    """
    query = split_query(request.scope["query_string"])
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        await check_encoding(request)
        names = JobParameters.model_fields
        images, given = await read_form(content_type, request.stream(), names, max_files)
        parameters = _validate(JobParameters, query, given)
        return SentJob(parameters, [*_name_uploads(images)], ())
    if media_type != "application/json":
        raise InvalidRequest(
            f"a job is multipart/form-data with files, or application/json with inputs, not "
            f"{media_type!r}"
        )
    body = await read_body(request, _MAX_JSON_BYTES)
    try:
        fields_given = parse_json(body)
    except ValueError as error:
        raise InvalidRequest(f"the body is no JSON: {error}") from error
    if not isinstance(fields_given, dict):
        raise InvalidRequest("the body is no JSON object")
    job = _validate(JobBody, query, fields_given)
    return SentJob(job, (), job.inputs)


def _name_uploads(images: Sequence[ImageFile]) -> list[JobFile]:
    return [
        JobFile(image.file_name or f"image_{number}", data=cast(bytes, image.data))
        for number, image in enumerate(images, 1)
    ]


def _validate(kind: type[P], query: Mapping[str, str], given: Mapping[str, Any]) -> P:
    if twice := sorted(set(query) & set(given)):
        raise InvalidParameter(f"the parameter {twice[0]!r} is given more than once")
    try:
        return kind.model_validate({**query, **given})
    except ValidationError as error:
        raise InvalidParameter(explain_errors(error.errors(), "parameter")) from error
