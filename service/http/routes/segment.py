"""POST /segment: image bytes in, COCO instances out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Annotated, Any
from urllib.parse import parse_qsl

import orjson
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from service.errors import (
    EmptyBody,
    InvalidMultipart,
    InvalidParameter,
    InvalidRequest,
)
from service.http.body import check_encoding, read_body
from service.http.form import PART_NAME, read_form
from service.http.routes.documents import FILE_TYPES, choose_document, describe_warnings
from service.http.routes.progress import ProgressResponse
from service.http.routes.state import ClientDep, SegmenterDep, find_client, get_segmenter
from service.http.schemas import ErrorResponse, SegmentQuery, SegmentResponse, TimeoutMs
from service.observe.timing import NO_TIME
from service.protocol import Segmented, Segmenter
from service.work.in_time import Stopped, describe_deadline, run_in_time
from service.work.request import ClientProfile, ImageFile, RequestOptions, RequestProgress

PATH = "/segment"
IMAGE_TYPES = (
    *("image/jpeg", "image/png", "image/webp", "image/bmp", "image/tiff", "image/jp2"),
    *("application/dicom", "application/zip"),  # of an OME-Zarr
)
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_CHOICES = ("model", "version")
"""Parameters that must be in the query: the model is chosen before the body is read."""
_FORM_FIELDS = tuple(name for name in SegmentQuery.model_fields if name not in _CHOICES)
_OPTIONS = tuple(
    field.name for field in dataclasses.fields(RequestOptions) if field.name != "overlay"
)
_PARTS = {
    "schema": {
        "type": "object",
        "required": [PART_NAME],
        "properties": {
            PART_NAME: {"type": "array", "items": {"type": "string", "format": "binary"}},
            **{name: SegmentQuery.model_json_schema()["properties"][name] for name in _FORM_FIELDS},
        },
    }
}
_REQUEST_BODY = {
    "requestBody": {
        "required": True,
        "content": {"multipart/form-data": _PARTS, **dict.fromkeys(IMAGE_TYPES, _BINARY)},
    }
}


JSON, PNG, NDJSON = "application/json", "image/png", "application/x-ndjson"
"""Media types of the answer, in the order of preference where a client accepts several."""
MAX_FILES = 256
"""Images in one request."""
_TIMEOUT_HEADER = "x-timeout-ms"
_NO_QUERY = SegmentQuery()
_MAX_PARAMETERS = 100
_TIMEOUT: TypeAdapter[int | None] = TypeAdapter(TimeoutMs)


router = APIRouter(tags=["segment"])


@router.post(
    PATH,
    response_class=Response,
    openapi_extra=_REQUEST_BODY,
    responses={
        200: {
            "model": SegmentResponse,
            "content": dict.fromkeys((PNG, NDJSON, *FILE_TYPES), _BINARY),
            "description": "Instances; with `format` a file, of several images a ZIP unless the "
            "format holds them all; for Accept: image/png the picture with its masks; for "
            "Accept: application/x-ndjson a progress line at least every 5 s, then a line with the "
            "result or the error",
        },
        **{
            status: {"model": ErrorResponse, "description": text}
            for status, text in {
                400: "Nothing to segment, or the request is broken",
                401: "An API key is needed",
                404: "No such model or version",
                408: "The body was not received in time",
                413: "Too many bytes, pixels, canvases or images",
                415: "Not an image of an allowed format, or a compressed body",
                422: "A parameter or the image is not valid",
                429: "The API key's limits are used up; see Retry-After",
                500: "The server failed",
                503: "Too much work in flight, or going down; see Retry-After",
                504: "Not done within timeout_ms",
            }.items()
        },
    },
)
async def segment(
    request: Request,
    query: Annotated[SegmentQuery, Query()],
    segmenter: SegmenterDep,
    client: ClientDep,
    x_timeout_ms: Annotated[TimeoutMs, Header()] = None,
) -> Response:
    """Segments one image (the body) or several (multipart parts named `images`).

    If one of several images fails, its result has an `error`; a single image that fails is
    answered with its error.

    ```sh
    image=tests/data/nuclei/images/16c3d5935ba94b72.jpg
    curl --fail-with-body -F images=@$image -F images=@$image localhost:8000/segment
    curl --fail-with-body --data-binary @$image 'localhost:8000/segment?masks=polygon'
    curl --fail-with-body -H 'Accept: image/png' -F images=@$image localhost:8000/segment -o out.png
    curl --fail-with-body -F images=@$image 'localhost:8000/segment?format=geojson' -o out.geojson
    curl --fail-with-body -H 'Accept: application/x-ndjson' -F images=@$image localhost:8000/segment
    ```
    """
    media_type = choose_media_type(request.headers.get("accept", ""))
    progress = RequestProgress(began_s=request.state.began_s)
    with ExitStack() as stack:
        model = stack.enter_context(segmenter.use(query.model, query.version, client))
        max_images = min(MAX_FILES, segmenter.admission.max_canvases)
        images, fields = await read_images(request, max_images)
        query = add_fields(query, fields)
        document = choose_document(query, images)
        if document is not None and media_type == PNG:
            media_type = JSON  # the format decides
        if media_type == PNG and len(images) > 1:
            raise InvalidRequest(f"Accept: image/png answers one image, not {len(images)}")
        asked = {name: getattr(query, name) for name in _OPTIONS}
        options = RequestOptions(**asked, overlay=media_type == PNG)
        timeout_ms = query.timeout_ms or x_timeout_ms
        work = segment_in_time(
            request, segmenter, model, images, options, client, progress, timeout_ms
        )
        if media_type == NDJSON:
            build = build_body if document is None else document.build_line
            response = ProgressResponse(work, build, progress, request.url.path)
            await response.admitted()
            response.closes(stack.pop_all())
            return response
        segmented = await work
    if document is not None:
        return document.respond(segmented)
    if media_type == PNG:
        outcome = only_success(segmented)
        return Response(outcome.payload, media_type=PNG, headers=describe_warnings([outcome]))
    return Response(build_body(segmented), media_type=JSON, headers={"vary": "accept"})


async def answer(request: Request) -> Response:
    """`segment` without FastAPI's routing and dependencies."""
    client = await find_client(request)
    query, timeout_ms = read_parameters(request)
    return await segment(request, query, await get_segmenter(request), client, timeout_ms)


ROUTE = Route(PATH, answer, methods=["POST"])
"""Goes before FastAPI's route of `segment`, which documents it, to save CPU time per request."""


def read_parameters(request: Request) -> tuple[SegmentQuery, int | None]:
    """The query and the header X-Timeout-Ms, validated as FastAPI does; nothing may be repeated.

    Raises:
        RequestValidationError: Names everything that is wrong.
        InvalidParameter: A parameter is given more than once, or is not UTF-8.
    """
    query, timeout_ms = _NO_QUERY, None
    wrong: list[dict[str, Any]] = []
    if request.scope["query_string"]:
        try:
            query = SegmentQuery.model_validate(split_query(request.scope["query_string"]))
        except ValidationError as error:
            wrong += _locate(error, "query")
    header = get_timeout_header(request)
    if header is not None:
        try:
            timeout_ms = _TIMEOUT.validate_python(header)
        except ValidationError as error:
            wrong += _locate(error, "header", _TIMEOUT_HEADER)
    if wrong:
        raise RequestValidationError(wrong)
    return query, timeout_ms


def get_timeout_header(request: Request) -> str | None:
    """The header X-Timeout-Ms as sent.

    Raises:
        InvalidParameter: It is given more than once.
    """
    values = request.headers.getlist(_TIMEOUT_HEADER)
    _refuse_repeated([_TIMEOUT_HEADER] * len(values))
    return values[0] if values else None


def split_query(text: bytes) -> dict[str, str]:
    """Names and values of a query, decoded."""
    try:
        pairs = parse_qsl(
            text.decode("latin-1"),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=_MAX_PARAMETERS,
        )
    except ValueError as error:  # includes UnicodeDecodeError
        raise InvalidParameter(f"the query cannot be read: {error}") from error
    values = dict(pairs)
    if len(values) < len(pairs):
        _refuse_repeated([name for name, _ in pairs])
    return values


def _refuse_repeated(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InvalidParameter(f"the parameter {name!r} is given more than once")
        seen.add(name)


def add_fields(query: SegmentQuery, fields: Mapping[str, str]) -> SegmentQuery:
    """The query together with the text fields of a form, which are validated alike.

    Raises:
        RequestValidationError: Names everything that is wrong.
        InvalidParameter: A parameter is given in both.
    """
    if not fields:
        return query
    _refuse_repeated([*query.model_fields_set, *fields])
    try:
        return SegmentQuery.model_validate({**query.model_dump(exclude_unset=True), **fields})
    except ValidationError as error:
        raise RequestValidationError(_locate(error, "form")) from error


def _locate(error: ValidationError, *place: str) -> list[dict[str, Any]]:
    return [{**item, "loc": (*place, *item["loc"])} for item in error.errors()]


async def segment_in_time(
    request: Request,
    segmenter: Segmenter,
    model: Any,
    images: Sequence[ImageFile],
    options: RequestOptions,
    client: ClientProfile,
    progress: RequestProgress,
    timeout_ms: int | None,
) -> Segmented:
    """`Segmenter.segment` until the deadline, or until the client leaves.

    Args:
        request: Its body must have been read.
        segmenter: The application's.
        model: What `Segmenter.use` gave.
        images: The request's.
        options: What it asks for.
        client: Its sender.
        progress: Kept up to date.
        timeout_ms: Counted from the request's first byte; None takes the server's default.

    Raises:
        ClientDisconnect: The client has closed the connection.
        DeadlineExceeded: The deadline has passed.
    """
    timeout_ms = timeout_ms or request.app.state.settings.request_timeout_ms
    deadline_s = request.state.began_s + timeout_ms / 1e3
    work = segmenter.segment(model, images, options, client, progress)
    try:
        return await run_in_time(work, deadline_s, _wait_for_leaving(request))
    except Stopped as stopped:
        segmenter.metrics.cancelled_images.labels(model.name, stopped.reason).inc(len(images))
        if stopped.reason == "client_left":
            raise ClientDisconnect from None
        raise describe_deadline(timeout_ms, progress) from stopped


async def _wait_for_leaving(request: Request) -> None:
    """Returns when the client closes the connection; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def only_success(segmented: Segmented) -> Any:
    """The outcome of the only image; raises its error if it failed."""
    (outcome,) = segmented.outcomes
    if outcome.error is not None:
        raise outcome.error
    return outcome


def build_body(segmented: Segmented) -> bytes:
    """The answer as JSON; raises the error of a single image that failed."""
    outcomes = segmented.outcomes
    if len(outcomes) == 1:
        only_success(segmented)
    timings = [outcome.timing for outcome in outcomes if outcome.timing is not None]
    last = max(timings, key=lambda timing: timing.total, default=NO_TIME)
    canvases = sum(outcome.canvases for outcome in outcomes)
    engine_ms = round(1e3 * sum(outcome.engine_s for outcome in outcomes), 3)
    body = {
        "model": segmented.model.name,
        "version": segmented.model.version,
        "task": segmented.model.config.task,
        "canvases": canvases,
        "cost": {"canvases": canvases, "engine_ms": engine_ms},
        "results": [orjson.Fragment(outcome.payload) for outcome in outcomes],
        "timing_ms": {stage: round(1e3 * seconds, 3) for stage, seconds in vars(last).items()},
    }
    return orjson.dumps(body)


def choose_media_type(accept: str) -> str:
    """The media type that an Accept header weighs highest; of equal ones JSON, then PNG."""
    weights = {JSON: 0.0, PNG: 0.0, NDJSON: 0.0}
    for item in accept.lower().split(","):
        media_type, _, parameters = item.partition(";")
        media_type = {"image/*": PNG}.get(media_type.strip(), media_type.strip())
        if media_type in weights:
            weights[media_type] = max(weights[media_type], _quality(parameters))
    return max(weights, key=lambda media_type: weights[media_type])


def _quality(parameters: str) -> float:
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


async def read_images(
    request: Request, max_images: int
) -> tuple[Sequence[ImageFile], Mapping[str, str]]:
    """A request's images, in memory, and the text fields of its form.

    Args:
        request: A form with files named `images`, or anything else: then the body is an image.
        max_images: Most files.

    Raises:
        EmptyBody: There are no bytes.
        UnsupportedEncoding: The body is compressed.
        InvalidMultipart, InvalidParameter, TooManyImages: See `read_form`.
    """
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        await check_encoding(request)
        return await read_form(content_type, request.stream(), _FORM_FIELDS, max_images)
    if media_type.startswith("multipart/"):
        raise InvalidMultipart(f"a form must be multipart/form-data, not {media_type}")
    data = await read_body(request)
    if not data:
        raise EmptyBody("the body is empty; send an image's bytes or multipart parts")
    return [ImageFile(None, data)], {}
