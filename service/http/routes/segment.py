"""POST /segment: image bytes in, COCO instances out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import APIRouter, Header, Query, Request, Response
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from service.errors import (
    DeadlineExceeded,
    EmptyBody,
    InvalidMultipart,
    InvalidRequest,
    TooManyImages,
)
from service.http.middleware import CLIENT_LEFT
from service.http.routes.state import QuotaDep, SegmenterDep, admit_images
from service.http.schemas import ErrorResponse, SegmentQuery, SegmentResponse, TimeoutMs
from service.observe.timing import NO_TIME
from service.work.segmenter import Segmenter
from service.work.stages import ImageFile, Outcome, ServedModel
from service.work.steps import Options

router = APIRouter(tags=["segment"])
T = TypeVar("T")

PATH = "/segment"
IMAGE_TYPES = ("image/jpeg", "image/png", "image/webp", "image/bmp")
PART_NAME = "images"
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_PARTS = {
    "schema": {
        "type": "object",
        "required": [PART_NAME],
        "properties": {
            PART_NAME: {"type": "array", "items": {"type": "string", "format": "binary"}}
        },
    }
}
_REQUEST_BODY = {
    "requestBody": {
        "required": True,
        "content": {"multipart/form-data": _PARTS, **dict.fromkeys(IMAGE_TYPES, _BINARY)},
    }
}


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


@router.post(
    PATH,
    response_class=Response,
    openapi_extra=_REQUEST_BODY,
    responses={
        200: {
            "model": SegmentResponse,
            "content": {"image/png": _BINARY},
            "description": "Instances; or, for Accept: image/png, the picture with its masks",
        },
        **{
            status: {"model": ErrorResponse, "description": text}
            for status, text in {
                400: "Nothing to segment, or the request is broken",
                401: "An API key is asked for",
                404: "No such model or version",
                408: "The body has stopped coming",
                413: "Too many bytes, pixels or images",
                415: "Not an image of an allowed format",
                422: "A parameter or the image is not valid",
                429: "The API key's share is used up; see Retry-After",
                500: "The server failed",
                503: "Too much work, or going down; see Retry-After",
                504: "Not done within timeout_ms",
            }.items()
        },
    },
)
async def segment(
    request: Request,
    query: Annotated[SegmentQuery, Query()],
    segmenter: SegmenterDep,
    quota: QuotaDep,
    x_timeout_ms: Annotated[TimeoutMs, Header()] = None,
) -> Response:
    """Segments one image (the body) or several (multipart parts named `images`).

    Of several images a bad one has an `error` in its result; a single bad one is the answer.

    ```sh
    image=tests/data/nuclei/images/16c3d5935ba94b72.jpg
    curl --fail-with-body -F images=@$image -F images=@$image localhost:8000/segment
    curl --fail-with-body --data-binary @$image 'localhost:8000/segment?masks=polygon'
    curl --fail-with-body -H 'Accept: image/png' -F images=@$image localhost:8000/segment -o out.png
    ```
    """
    with segmenter.use_model(query.model, query.version) as model:
        overlay = wants_png(request.headers.get("accept", ""))
        images = await read_images(request, segmenter.admission.max_images)
        if overlay and len(images) > 1:
            raise InvalidRequest(f"Accept: image/png answers one image, not {len(images)}")
        options = Options(
            score_threshold=query.score_threshold,
            max_instances=query.max_instances,
            masks=query.masks,
            overlay=overlay,
            priority=query.priority,
        )
        timeout_ms = query.timeout_ms or x_timeout_ms
        try:
            with admit_images(quota, len(images)):
                outcomes = await segment_in_time(
                    request, segmenter, model, images, options, timeout_ms
                )
        except ClientLeft:
            return Response(status_code=CLIENT_LEFT)
    return build_response(model, outcomes, overlay=overlay)


async def segment_in_time(
    request: Request,
    segmenter: Segmenter,
    model: ServedModel,
    images: Sequence[ImageFile],
    options: Options,
    timeout_ms: int | None,
) -> list[Outcome]:
    """`Segmenter.segment` as long as somebody waits for it.

    Args:
        request: Its body must have been read.
        segmenter: The application's.
        model: Who segments.
        images: The request's.
        options: What it asks for.
        timeout_ms: Counted from the request's first byte; None takes the server's default.

    Raises:
        ClientLeft: The client is gone.
        DeadlineExceeded: The time is over.
    """
    timeout_ms = timeout_ms or segmenter.default_timeout_ms
    work = segmenter.segment(model, images, options)
    try:
        if timeout_ms is None:
            return await until_client_leaves(request, work)
        async with asyncio.timeout_at(request.state.began_s + timeout_ms / 1e3):
            return await until_client_leaves(request, work)
    except ClientLeft:
        segmenter.metrics.cancelled_images.labels(model.name, "client_left").inc(len(images))
        raise
    except TimeoutError as error:
        segmenter.metrics.cancelled_images.labels(model.name, "deadline").inc(len(images))
        raise DeadlineExceeded(f"the request was not done within {timeout_ms} ms") from error


def build_response(model: ServedModel, outcomes: Sequence[Outcome], *, overlay: bool) -> Response:
    """The answer of a request's outcomes; raises the error of a single failed image."""
    if len(outcomes) == 1 and outcomes[0].error is not None:
        raise outcomes[0].error
    headers = {"vary": "accept"}
    if overlay:
        return Response(outcomes[0].payload, media_type="image/png", headers=headers)
    timings = [outcome.timing for outcome in outcomes if outcome.timing is not None]
    last = max(timings, key=lambda timing: timing.total, default=NO_TIME)
    body = {
        "model": model.name,
        "version": model.loaded.version,
        "task": model.loaded.config.task,
        "results": [orjson.Fragment(outcome.payload) for outcome in outcomes],
        "timing_ms": {stage: round(1e3 * seconds, 3) for stage, seconds in vars(last).items()},
    }
    return Response(orjson.dumps(body), media_type="application/json", headers=headers)


def wants_png(accept: str) -> bool:
    """Whether an Accept header names image/png (or image/*) before application/json."""
    weights = {"image/png": 0.0, "application/json": 0.0}
    for item in accept.lower().split(","):
        media_type, _, parameters = item.partition(";")
        media_type = {"image/*": "image/png"}.get(media_type.strip(), media_type.strip())
        if media_type in weights:
            weights[media_type] = max(weights[media_type], _quality(parameters))
    return weights["image/png"] > weights["application/json"]


def _quality(parameters: str) -> float:
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


async def read_images(request: Request, max_images: int) -> list[ImageFile]:
    """A request's images, in memory.

    Args:
        request: Multipart with parts named `images`, or anything else: then the body is an image.
        max_images: Most parts.

    Raises:
        EmptyBody: There are no bytes.
        InvalidMultipart: Broken, or no file part is named `images`.
        TooManyImages: More parts than the server can ever have in work.
    """
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
        data = await request.body()
        if not data:
            raise EmptyBody("the body is empty; send an image's bytes or multipart parts")
        return [ImageFile(None, data)]
    parser = _InMemoryParser(
        request.headers, _not_empty(request.stream()), max_files=max_images, max_fields=16
    )
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        reason = getattr(error, "message", "no boundary is named in Content-Type")
        if reason.startswith("Too many files"):
            raise TooManyImages(f"one request may have {max_images} images") from error
        raise InvalidMultipart(f"the multipart body cannot be read: {reason}") from error
    images = [
        ImageFile(part.filename or None, await part.read())
        for part in form.getlist(PART_NAME)
        if isinstance(part, UploadFile)
    ]
    if not images:
        found = sorted({name for name, _ in form.multi_items()})
        raise InvalidMultipart(
            f"no file part is named {PART_NAME!r} (with a file name); the parts are {found}"
        )
    await form.close()
    return images


class _InMemoryParser(MultiPartParser):
    """Keeps parts in memory: the body's limit bounds them, and disks are slow."""

    spool_max_size = 1 << 62


async def _not_empty(stream: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """Passes a stream on and raises `EmptyBody` if it has no bytes."""
    empty = True
    async for chunk in stream:
        empty = empty and not chunk
        yield chunk
    if empty:
        raise EmptyBody("the body is empty; send parts named 'images'")


async def until_client_leaves(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Runs `work`; cancels it as soon as the client is gone.

    Args:
        request: Its body must have been read.
        work: What the client waits for.

    Raises:
        ClientLeft: The client is gone.
    """
    task = asyncio.current_task()
    assert task is not None
    cancelled_before = task.cancelling()
    watcher = asyncio.ensure_future(_cancel_when_client_leaves(request, task))
    try:
        return await work
    except asyncio.CancelledError:
        client_left = watcher.done() and not watcher.cancelled()
        if client_left and task.uncancel() <= cancelled_before:
            raise ClientLeft from None
        raise
    finally:
        watcher.cancel()


async def _cancel_when_client_leaves(request: Request, task: asyncio.Task[Any]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    task.cancel()
