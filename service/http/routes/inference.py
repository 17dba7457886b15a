"""The Open Inference Protocol: GET /v2, /v2/models/{name}/ready, POST /v2/models/{name}/infer.

A model's metadata is in `service.http.routes.models`. Every path of a model also takes
`/versions/{version}`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Header, Request, Response

from service.errors import build_error_body
from service.http.body import read_body
from service.http.oip.infer import build_options, find_failure
from service.http.oip.read import InferCall, read_request
from service.http.oip.schemas import (
    InferRequest,
    InferResponse,
    ModelReady,
    ProtocolError,
    ServerMetadata,
    inline_schema,
)
from service.http.oip.write import build_body, build_tensors
from service.http.routes.segment import MAX_FILES, get_timeout_header, segment_in_time
from service.http.routes.state import ClientDep, SegmenterDep
from service.http.schemas import TimeoutMs, VersionNumber
from service.protocol import ModelState, Segmenter
from service.settings import Settings
from service.work.request import ClientProfile, ImageFile, Outcome, RequestProgress

router = APIRouter(tags=["open inference protocol"])

HEADER_LENGTH = "Inference-Header-Content-Length"
BINARY_DATA = "binary_tensor_data"
HeaderLength = Annotated[
    int | None,
    Header(alias=HEADER_LENGTH, ge=1, description="bytes of JSON before the binary data"),
]

_EMPTY_PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAAAAAA6mKC9AAAADUlEQVR42mNgGAXIAAABEAABf80DtQAAAABJRU5E"
    "rkJggg=="
)
_EXAMPLE = {
    "id": "first",
    "parameters": {"score_threshold": 0.5},
    "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [_EMPTY_PNG]}],
    "outputs": [{"name": "scores"}, {"name": "rle"}],
}
_REQUEST_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": inline_schema(InferRequest), "example": _EXAMPLE},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
_FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": ProtocolError, "description": text}
    for status, text in {
        400: "The request cannot be understood",
        401: "An API key is needed",
        404: "No such model or version",
        413: "Too many bytes, pixels, canvases or images",
        415: "Not an image of an allowed format, or a compressed body",
        422: "A parameter, a tensor or the image is not valid",
        429: "The API key's limits are used up; see Retry-After",
        500: "The server failed",
        503: "Too much work in flight, or going down; see Retry-After",
        504: "Not done in time",
    }.items()
}
_NOT_READY: dict[int | str, dict[str, Any]] = {
    404: _FAILURES[404],
    422: _FAILURES[422],
    503: {
        "model": ModelReady | ProtocolError,
        "description": "Going down, or the model is refused",
    },
}


@router.get("/v2")
async def show_server(request: Request) -> ServerMetadata:
    """The server's name, version and what it knows of the protocol.

    ```sh
    curl --fail-with-body localhost:8000/v2
    ```
    """
    extensions = [BINARY_DATA, *list_extensions(request.app.state.settings)]
    return ServerMetadata(name="solo-serve", version=request.app.version, extensions=extensions)


def list_extensions(settings: Settings) -> list[str]:
    """The protocol's extensions that both HTTP and gRPC have; the admin port has the repository."""
    repository = [] if settings.admin_port is not None else ["model_repository"]
    return ["model_configuration", *repository, "parameters", "statistics"]


@router.get("/v2/models/{name}/ready", responses=_NOT_READY)
async def show_ready(name: str, segmenter: SegmenterDep, response: Response) -> ModelReady:
    """200 if the model takes work, else 503.

    ```sh
    curl --fail-with-body localhost:8000/v2/models/nuclei/ready
    ```
    """
    return _check_ready(segmenter.find(name, None), segmenter, response)


@router.get("/v2/models/{name}/versions/{version}/ready", responses=_NOT_READY)
async def show_version_ready(
    name: str, version: VersionNumber, segmenter: SegmenterDep, response: Response
) -> ModelReady:
    """200 if this version of the model takes work, else 503."""
    return _check_ready(segmenter.find(name, version), segmenter, response)


def _check_ready(model: ModelState, segmenter: Segmenter, response: Response) -> ModelReady:
    if not segmenter.is_ready:
        response.status_code = 503
    return ModelReady(name=model.name, ready=segmenter.is_ready)


@dataclass(frozen=True)
class Sent:
    """What both paths of `infer` take from a request."""

    request: Request
    segmenter: Segmenter
    client: ClientProfile
    header_length: int | None
    timeout_ms: int | None


async def _get_sent(
    request: Request,
    segmenter: SegmenterDep,
    client: ClientDep,
    header_length: HeaderLength = None,
    x_timeout_ms: Annotated[TimeoutMs, Header()] = None,
) -> Sent:
    get_timeout_header(request)  # FastAPI takes the last of several
    return Sent(request, segmenter, client, header_length, x_timeout_ms)


SentDep = Annotated[Sent, Depends(_get_sent)]


@router.post(
    "/v2/models/{name}/infer",
    response_class=Response,
    openapi_extra=_REQUEST_BODY,
    responses={200: {"model": InferResponse}, **_FAILURES},
)
async def infer(name: str, sent: SentDep) -> Response:
    r"""Segments the images of the input `image`; tritonclient works with it.

    The input is BYTES [N], encoded files (in JSON as base64), or UINT8 [H, W, 3], raw RGB. Of
    several images a bad one has a text in the output `error`; where `error` is not asked for, or
    the image is alone, the request fails.

    ```sh
    image=tests/data/nuclei/images/16c3d5935ba94b72.jpg
    input='{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["&"]}'
    base64 < $image | tr -d '\n' | sed "s|.*|{\"inputs\": [$input]}|" |
      curl --fail-with-body --data-binary @- localhost:8000/v2/models/nuclei/infer
    ```
    """
    return await _infer(name, None, sent)


@router.post(
    "/v2/models/{name}/versions/{version}/infer",
    response_class=Response,
    openapi_extra=_REQUEST_BODY,
    responses={200: {"model": InferResponse}, **_FAILURES},
)
async def infer_version(name: str, version: VersionNumber, sent: SentDep) -> Response:
    """As `/v2/models/{name}/infer`, by a certain version."""
    return await _infer(name, version, sent)


async def _infer(name: str, version: int | None, sent: Sent) -> Response:
    segmenter, request = sent.segmenter, sent.request
    with segmenter.use(name, version, sent.client) as model:
        body = await read_body(request)
        max_images = min(MAX_FILES, segmenter.admission.max_canvases)
        call = await asyncio.to_thread(read_request, body, sent.header_length, max_images)
        images = [ImageFile(None, image) for image in call.images]
        timeout_ms = call.parameters.timeout_ms or sent.timeout_ms
        segmented = await segment_in_time(
            request,
            segmenter,
            model,
            images,
            build_options(call),
            sent.client,
            RequestProgress(began_s=request.state.began_s),
            timeout_ms,
        )
    failure = find_failure(call, segmented.outcomes)
    if failure is not None:
        status, detail = failure
        failed = build_error_body(detail, request.url.path)
        return Response(failed, status, media_type="application/json")
    return _build_answer(segmented.model, call, segmented.outcomes)


def _build_answer(model: ModelState, call: InferCall, outcomes: Sequence[Outcome]) -> Response:
    answer: dict[str, Any] = {
        "model_name": model.name,
        "model_version": str(model.version),
    }
    if call.request_id is not None:
        answer["id"] = call.request_id
    # An image's answer is written once for both protocols, so both say the same of it.
    tensors = build_tensors([orjson.loads(outcome.payload) for outcome in outcomes])
    body, json_bytes = build_body(answer, tensors, call.outputs)
    if json_bytes is None:
        return Response(body, media_type="application/json")
    headers = {HEADER_LENGTH: str(json_bytes)}
    return Response(body, headers=headers, media_type="application/octet-stream")
