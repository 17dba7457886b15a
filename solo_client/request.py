"""The request of POST /segment: options and images as arguments of httpx."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from solo_client.images import ImageInput, read_input

ACCEPT = "application/x-ndjson, application/json;q=0.9"
"""Progress while the server works; a server that has none answers with JSON."""


class Options(TypedDict, total=False):
    """Options of a request; the server's default applies to None and to a missing option.

    Attributes:
        model: Name of a model.
        version: Version of the model.
        score_threshold: Lowest score, 0..1.
        max_instances: Highest number of instances in an image.
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
    """Arguments of httpx' `stream` for POST /segment.

    Raises:
        TypeError: An unknown option, or an image of an unsupported type.
        OSError, ValueError: An image cannot be sent.
    """
    unknown = sorted(set(options) - set(Options.__annotations__))
    if unknown:
        raise TypeError(
            f"unknown options {unknown}; the options are {sorted(Options.__annotations__)}"
        )
    known = ("model", "version", "score_threshold", "max_instances")
    given = {name: options.get(name) for name in known}
    query = {name: str(value) for name, value in given.items() if value is not None}
    if not options.get("masks", True):
        query["masks"] = "none"
    for name, value in options.get("query", {}).items():
        query[name] = str(value)
    headers = {"accept": ACCEPT}
    request: dict[str, Any] = {"method": "POST", "url": "/segment", "params": query}
    read = [read_input(image) for image in images]
    if len(read) == 1:
        headers["content-type"] = "application/octet-stream"
        return {**request, "content": read[0][1], "headers": headers}
    parts = [
        ("images", (name or f"image_{index}", data, "application/octet-stream"))
        for index, (name, data) in enumerate(read)
    ]
    return {**request, "files": parts, "headers": headers}


def name_of(image: ImageInput) -> str | None:
    """The file name of a path; None for any other input."""
    return os.path.basename(image) if isinstance(image, (str, os.PathLike)) else None
