"""Requests and answers of POST /segment, without the sending."""

from __future__ import annotations

import email.utils
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import httpx

from solo_client.errors import (
    Busy,
    ConnectionFailed,
    ImageFailed,
    RequestRefused,
    ServerError,
    ServerFailed,
    SoloError,
    TimedOut,
    UnexpectedAnswer,
)
from solo_client.images import ImageInput, read_input
from solo_client.result import Instance, Result

IMAGE_CODES = frozenset(
    ("empty_image", "unsupported_format", "image_too_large", "corrupt_image", "engine_error")
)
"""Errors that are a single image's fault, not the request's."""


class Options(TypedDict, total=False):
    """What may be asked for; None and what is left out take the server's default.

    Attributes:
        model: A model's name.
        version: Its version.
        score_threshold: Least score, 0..1.
        max_instances: Most instances.
        masks: False leaves the masks out.
        query: Other parameters of POST /segment, e.g. {"timeout_ms": 500, "priority": "batch"}.
    """

    model: str | None
    version: int | None
    score_threshold: float | None
    max_instances: int | None
    masks: bool
    query: Mapping[str, str | int | float]


def build_request(images: Sequence[ImageInput], options: Options) -> dict[str, Any]:
    """Arguments of httpx' `request` for POST /segment.

    Raises:
        TypeError: An option or an image is none.
        OSError, ValueError: An image cannot be sent.
    """
    unknown = sorted(set(options) - set(Options.__annotations__))
    if unknown:
        raise TypeError(f"there are no options {unknown}, only {sorted(Options.__annotations__)}")
    known = ("model", "version", "score_threshold", "max_instances")
    asked = {name: options.get(name) for name in known}
    query = {name: str(value) for name, value in asked.items() if value is not None}
    if not options.get("masks", True):
        query["masks"] = "none"
    for name, value in options.get("query", {}).items():
        query[name] = str(value)
    request: dict[str, Any] = {"method": "POST", "url": "/segment", "params": query}
    read = [read_input(image) for image in images]
    if len(read) == 1:
        headers = {"content-type": "application/octet-stream"}
        return {**request, "content": read[0][1], "headers": headers}
    parts = [
        ("images", (name or f"image_{index}", data, "application/octet-stream"))
        for index, (name, data) in enumerate(read)
    ]
    return {**request, "files": parts}


def name_of(image: ImageInput) -> str | None:
    """A path's file name; None for anything else."""
    return os.path.basename(image) if isinstance(image, (str, os.PathLike)) else None


def read_results(
    response: httpx.Response, images: Sequence[ImageInput]
) -> list[Result | ImageFailed]:
    """An answer's results, in the order of the images.

    Raises:
        UnexpectedAnswer: It is none of POST /segment for these images.
    """
    try:
        answer = response.json()
        common = {
            "model": str(answer["model"]),
            "version": int(answer["version"]),
            "task": str(answer.get("task", "segmentation")),
            "timing_ms": answer.get("timing_ms", {}),
        }
        names = [name_of(image) for image in images]
        return [
            _read_result(index, name, entry, common)
            for index, (name, entry) in enumerate(zip(names, answer["results"], strict=True))
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        start = response.text[:100]
        raise UnexpectedAnswer(
            f"{response.url}: not an answer of solo-serve ({error!r}): {start!r}"
        ) from error


def _read_result(
    index: int, name: str | None, entry: Mapping[str, Any], common: Mapping[str, Any]
) -> Result | ImageFailed:
    if entry.get("error") is not None:
        return ImageFailed(index, name, entry["error"]["code"], entry["error"]["message"])
    instances = tuple(
        Instance(
            category_id=found["category_id"],
            category=found["category"],
            score=found["score"],
            bbox_xywh=tuple(found["bbox"]),
            area=found["area"],
            rle=found.get("segmentation"),
        )
        for found in entry["instances"]
    )
    return Result(name, entry["height"], entry["width"], instances, **common)


def blame_image(error: ServerError, images: Sequence[ImageInput]) -> list[Result | ImageFailed]:
    """The result of a single image that the server refused; any other error is raised again."""
    if len(images) != 1 or error.code not in IMAGE_CODES:
        raise error
    failed = ImageFailed(0, name_of(images[0]), error.code, error.message)
    failed.__cause__ = error
    return [failed]


def read_models(response: httpx.Response) -> list[dict[str, Any]]:
    """An answer's list of models.

    Raises:
        UnexpectedAnswer: It is none of GET /v2/models.
    """
    try:
        models: list[dict[str, Any]] = response.json()["models"]
    except (ValueError, KeyError, TypeError) as error:
        raise UnexpectedAnswer(f"{response.url}: not an answer of solo-serve: {error!r}") from error
    return models


def read_failure(response: httpx.Response) -> ServerError:
    """The error that an answer with any status but 2xx is."""
    status = response.status_code
    code, message = "", response.reason_phrase
    try:
        body = response.json()
        error = body["error"]
        if isinstance(error, dict):
            code, message = str(error["code"]), str(error["message"])
        else:  # under /v2, as the Open Inference Protocol wants it
            code, message = str(body.get("code", "")), str(error)
    except (ValueError, KeyError, TypeError):
        pass  # something between the server and us
    request_id = response.headers.get("x-request-id")
    if status in (429, 503):
        retry_after_s = _read_retry_after(response.headers.get("retry-after"))
        return Busy(status, code, message, request_id=request_id, retry_after_s=retry_after_s)
    kind = RequestRefused if 400 <= status < 500 else ServerFailed
    return kind(status, code, message, request_id=request_id)


def _read_retry_after(value: str | None) -> float | None:
    """Seconds from now; the header has seconds or a date."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def translate(error: httpx.RequestError, url: str) -> SoloError:
    """The error of ours that one of httpx is, with that as its cause."""
    text = f"{url}: {error or type(error).__name__}"
    slow = isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout)
    failure: SoloError = TimedOut(text) if slow else ConnectionFailed(text)
    failure.__cause__ = error
    return failure
