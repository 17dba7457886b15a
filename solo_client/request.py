"""The request of POST /segment: options and images as arguments of httpx."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict
from urllib.parse import quote

from solo_client.images import ImageInput, read_input

READY: dict[str, Any] = {"method": "GET", "url": "/v2/health/ready"}
MODELS: dict[str, Any] = {"method": "GET", "url": "/v2/models"}
_HEADERS = {
    "accept": "application/x-ndjson, application/json;q=0.9",
    "accept-encoding": "identity",
}
"""Progress while the server works; a server that has none answers with JSON. A proxy that
compressed the answer would hold the progress back."""

_ENCODED = {"masks", "query"}
"""Options that are not parameters of the same name."""


class Options(TypedDict, total=False):
    """Options of a request; the server's default applies to None and to a missing option.

    Attributes:
        model: Name of a model.
        version: Version of the model.
        score_threshold: Lowest score, 0..1.
        max_instances: Highest number of instances in an image.
        overlaps: "resolve" gives pixels of several masks to the best instance.
        object_size_px: Typical diameter of the objects in the images, px.
        um_per_px: Size of the images' pixels in micrometres, instead of `object_size_px`.
        scale: "auto" finds the scale from the objects of each image.
        masks: False leaves the masks out.
        query: Other parameters of POST /segment, e.g. {"timeout_ms": 500, "priority": "batch"}.
    """

    model: str | None
    version: int | None
    score_threshold: float | None
    max_instances: int | None
    overlaps: str | None
    object_size_px: float | None
    um_per_px: float | None
    scale: str | None
    masks: bool
    query: Mapping[str, str | int | float]


def build_query(options: Options) -> dict[str, str]:
    """The options as query parameters.

    Raises:
        TypeError: An option is unknown.
    """
    unknown = sorted(set(options) - set(Options.__annotations__))
    if unknown:
        raise TypeError(
            f"unknown options {unknown}; the options are {sorted(Options.__annotations__)}"
        )
    given = {name: options.get(name) for name in Options.__annotations__ if name not in _ENCODED}
    query = {name: str(value) for name, value in given.items() if value is not None}
    if not options.get("masks", True):
        query["masks"] = "none"
    for name, value in options.get("query", {}).items():
        query[name] = str(value)
    return query


Part = tuple[str, tuple[str, bytes, str]]


def build_parts(images: Iterable[ImageInput]) -> tuple[list[str | None], list[Part]]:
    """The file names of the images (`read_input`), and the parts of a form.

    Raises:
        TypeError: An image of an unsupported type.
        OSError, ValueError: An image cannot be sent.
    """
    if isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview)):
        raise TypeError(f"several images are a list or another iterable, not {images!r:.100}")
    read = [read_input(image) for image in images]
    parts = [
        ("images", (_as_utf8(name or f"image_{index}"), data, "application/octet-stream"))
        for index, (name, data) in enumerate(read)
    ]
    return [name for name, _ in read], parts


def build_request(
    images: Iterable[ImageInput], options: Options
) -> tuple[list[str | None], dict[str, Any]]:
    """The file names of the images (`read_input`), and httpx' arguments for POST /segment.

    Raises:
        TypeError: An unknown option, or an image of an unsupported type.
        OSError, ValueError: An image cannot be sent.
    """
    request: dict[str, Any] = {"method": "POST", "url": "/segment", "params": build_query(options)}
    names, parts = build_parts(images)
    if len(parts) == 1:
        headers = {**_HEADERS, "content-type": "application/octet-stream"}
        return names, {**request, "content": parts[0][1][1], "headers": headers}
    return names, {**request, "files": parts, "headers": _HEADERS}


def build_file_request(
    images: Iterable[ImageInput], format: str, options: Options
) -> dict[str, Any]:
    """Httpx' arguments for POST /segment with an output format.

    Raises:
        TypeError, OSError, ValueError: As of `build_request`, or there are no images.
    """
    query = {**options.get("query", {}), "format": format}
    names, request = build_request(images, {**options, "query": query})
    if not names:
        raise ValueError("there are no images")
    return request


def build_description(name: str, version: int | None) -> dict[str, Any]:
    """Httpx' arguments for GET /v2/models/{name} or one of its versions."""
    path = f"/v2/models/{quote(name, safe='')}"
    return {"method": "GET", "url": path if version is None else f"{path}/versions/{version}"}


def _as_utf8(name: str) -> str:
    """The name with a replacement for each byte that is not UTF-8."""
    return os.fsencode(name).decode("utf-8", "replace")
