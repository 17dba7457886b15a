"""A machine-learning back end for Label Studio that asks a running solo-serve.

`python -m integrations.label_studio --help`. It answers GET /health, POST /setup, POST /predict and
POST /webhook. Predictions are polygons or brush masks, by the labelling configuration.

Symbols: H W image.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
import numpy as np
import uvicorn
from numpy.typing import NDArray
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from solo_client import Client, Instance, SoloError

logger = logging.getLogger(__name__)

_KINDS = {"PolygonLabels": "polygonlabels", "BrushLabels": "brushlabels"}
_RUN_BITS = (3, 6, 9, 16)
"""Bits of a run's length, of which each run names one."""
_MOST_BYTES = 2**28
_ORIENTATION, _SWAPPED = 0x0112, (5, 6, 7, 8)
Found = tuple[str, float, tuple[int, int], dict[str, Any]]
"""Class, score, width and height of the image, and the shape in Label Studio's terms."""


class TaskError(ValueError):
    """A request or a task cannot be used; the message is for the user of Label Studio."""


@dataclass(frozen=True)
class Target:
    """Where predictions go in a labelling configuration.

    Attributes:
        kind: A key of `_KINDS`.
        from_name: Name of the control tag.
        to_name: Name of the image tag.
        field: Key of the image's address in a task's data.
        labels: Values of the labels.
    """

    kind: str
    from_name: str
    to_name: str
    field: str
    labels: tuple[str, ...]

    def choose_label(self, category: str) -> str | None:
        """The label of a class: of the same name, or the only one there is."""
        same = [label for label in self.labels if label.casefold() == category.casefold()]
        return next(iter(same), self.labels[0] if len(self.labels) == 1 else None)


def read_config(text: str) -> Target:
    """Finds the polygons or brush of a labelling configuration.

    Raises:
        TaskError: It is not XML, or has no such control for an image.
    """
    try:
        root = ET.fromstring(text)
    except ET.ParseError as error:
        raise TaskError(f"the labelling configuration is not XML: {error}") from error
    images = {tag.get("name"): tag.get("value", "") for tag in root.iter("Image")}
    for kind in _KINDS:
        for tag in root.iter(kind):
            to_name, labels = tag.get("toName"), [label.get("value") for label in tag.iter("Label")]
            if to_name in images and images[to_name].startswith("$"):
                return Target(
                    kind=kind,
                    from_name=tag.get("name", ""),
                    to_name=str(to_name),
                    field=images[to_name][1:],
                    labels=tuple(label for label in labels if label),
                )
    raise TaskError(f"the labelling configuration has none of {', '.join(_KINDS)} for an <Image>")


@dataclass
class LabelStudioBackend:
    """Predicts tasks.

    Attributes:
        client: Of solo-serve.
        label_studio_url: Where relative addresses of images lead.
        token: Access token of Label Studio, legacy or personal; None: no authentication.
        options: Of each request, e.g. model and score_threshold.
    """

    client: Client
    label_studio_url: str
    token: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=60))

    def predict(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to POST /predict: a prediction for each task, in their order.

        Raises:
            TaskError: A task cannot be read, or its image cannot be fetched.
            SoloError: The server cannot segment an image.
        """
        tasks, config = content.get("tasks"), content.get("label_config")
        if not isinstance(tasks, list) or not isinstance(config, str):
            raise TaskError("a request has a list 'tasks' and a text 'label_config'")
        target = read_config(config)
        version = self.find_version()
        results = [self._predict_task(task, target, version) for task in tasks]
        return {"results": results, "model_version": version}

    def find_version(self) -> str:
        """Name and version of the model that is asked; "solo-serve" if several may be."""
        wanted = self.options.get("model")
        models = [m for m in self.client.list_models() if wanted in (None, m["name"])]
        ready = [f"{m['name']}:{m['version']}" for m in models if m["state"] == "READY"]
        return ready[0] if len(ready) == 1 else "solo-serve"

    def _predict_task(self, task: Any, target: Target, version: str) -> dict[str, Any]:
        try:
            address = str(task["data"][target.field])
        except (KeyError, TypeError) as error:
            raise TaskError(f"a task has no data field {target.field!r}") from error
        image = self.fetch(address)
        find = self._find_polygons if target.kind == "PolygonLabels" else self._find_brushes
        regions = []
        for category, score, size, value in find(image):
            label = target.choose_label(category)
            if label is None:
                logger.warning("no label for class %r in %s", category, target.labels)
                continue
            regions.append(_describe(target, size, value, label, score))
        scores = [region["score"] for region in regions]
        return {
            "result": regions,
            "score": float(np.mean(scores)) if scores else 0.0,
            "model_version": version,
        }

    def _find_polygons(self, image: bytes) -> Iterator[Found]:
        """Each part's outer ring in per cent of the image."""
        geojson = self.client.segment_to_file([image], "geojson", **self.options).data
        size = _read_size(image)
        for feature in json.loads(geojson)["features"]:
            geometry, properties = feature["geometry"], feature["properties"]
            parts = geometry["coordinates"]
            name, score = properties["classification"]["name"], properties["measurements"]["Score"]
            for rings in parts if geometry["type"] == "MultiPolygon" else [parts]:
                points = np.array(rings[0][:-1]) * 100.0 / size
                yield name, score, size, {"points": points.tolist(), "closed": True}

    def _find_brushes(self, image: bytes) -> Iterator[Found]:
        found = self.client.segment(image, **self.options)
        size = found.width, found.height
        for instance in found.instances:
            value = {"format": "rle", "rle": encode_brush(instance)}
            yield instance.category, instance.score, size, value

    def fetch(self, address: str) -> bytes:
        """The bytes of a task's image; the token is only sent to Label Studio.

        Raises:
            TaskError: The address is not one of HTTP, or nothing can be loaded from it.
        """
        url = urljoin(self.label_studio_url, address)
        if urlsplit(url).scheme not in ("http", "https"):
            raise TaskError(f"the image {address!r} is not behind an HTTP address")
        own = urlsplit(url).netloc == urlsplit(self.label_studio_url).netloc
        try:
            headers = self._authorize() if own else {}
            with self.http.stream("GET", url, headers=headers) as response:
                response.raise_for_status()
                return _read_bounded(response, address)
        except httpx.HTTPError as error:
            raise TaskError(f"the image {address!r} cannot be loaded: {error}") from error

    def _authorize(self) -> dict[str, str]:
        if self.token is None:
            return {}
        if self.token.count(".") != 2:
            return {"authorization": f"Token {self.token}"}
        # A personal token is exchanged for one that is valid for minutes.
        url = urljoin(self.label_studio_url, "/api/token/refresh")
        response = self.http.post(url, json={"refresh": self.token})
        response.raise_for_status()
        return {"authorization": f"Bearer {response.json()['access']}"}


def _read_bounded(response: httpx.Response, address: str) -> bytes:
    data = bytearray()
    for chunk in response.iter_bytes():
        data += chunk
        if len(data) > _MOST_BYTES:
            raise TaskError(f"the image {address!r} has more than {_MOST_BYTES} bytes")
    return bytes(data)


def _read_size(data: bytes) -> tuple[int, int]:
    """Width and height of an image as its EXIF orientation turns it."""
    with Image.open(io.BytesIO(data)) as image:
        turned = image.getexif().get(_ORIENTATION, 1) in _SWAPPED
        return image.size[::-1] if turned else image.size


def _describe(
    target: Target, size: tuple[int, int], value: dict[str, Any], label: str, score: float
) -> dict[str, Any]:
    kind = _KINDS[target.kind]
    return {
        "type": kind,
        "from_name": target.from_name,
        "to_name": target.to_name,
        "original_width": size[0],
        "original_height": size[1],
        "image_rotation": 0,
        "score": score,
        "value": {**value, kind: [label]},
    }


def encode_brush(instance: Instance) -> list[int]:
    """A mask as Label Studio's brush: bit-packed runs of an RGBA picture, all channels alike."""
    flat = np.asarray(instance.mask).ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    bounds = np.concatenate([[0], edges, [flat.size]])
    bits = [f"{4 * flat.size:032b}", f"{7:05b}", *(f"{size - 1:04b}" for size in _RUN_BITS)]
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        bits += _encode_run(4 * (stop - start), 255 if flat[start] else 0)
    text = "".join(bits)
    packed: NDArray[np.uint8] = np.packbits(np.frombuffer(text.encode(), np.uint8) - ord("0"))
    values: list[int] = packed.tolist()
    return values


def _encode_run(length: int, value: int) -> Iterator[str]:
    """A bit for a run, the number of its length's bits, its length less 1, its value."""
    while length:
        part = min(length, 1 << _RUN_BITS[-1])
        size = next(i for i, bits in enumerate(_RUN_BITS) if part <= 1 << bits)
        yield f"1{size:02b}{part - 1:0{_RUN_BITS[size]}b}{value:08b}"
        length -= part


def build_app(backend: LabelStudioBackend) -> Starlette:
    """The HTTP application."""

    async def health(request: Request) -> JSONResponse:
        ready = await run_in_threadpool(backend.client.is_ready)
        status = "UP" if ready else "DOWN"
        return JSONResponse(
            {"status": status, "model_class": "solo-serve"}, status_code=200 if ready else 503
        )

    async def setup(request: Request) -> JSONResponse:
        content = await _read(request)
        if content.get("schema"):
            read_config(str(content["schema"]))
        return JSONResponse({"model_version": await run_in_threadpool(backend.find_version)})

    async def predict(request: Request) -> JSONResponse:
        return JSONResponse(await run_in_threadpool(backend.predict, await _read(request)))

    async def webhook(request: Request) -> JSONResponse:
        return JSONResponse({}, status_code=201)  # annotations do not train the server's model

    async def fail(request: Request, error: Exception) -> JSONResponse:
        logger.warning("%s: %s", request.url.path, error)
        return JSONResponse({"error": str(error)}, 400 if isinstance(error, TaskError) else 502)

    return Starlette(
        routes=[
            Route("/", health),
            Route("/health", health),
            Route("/setup", setup, methods=["POST"]),
            Route("/predict", predict, methods=["POST"]),
            Route("/webhook", webhook, methods=["POST"]),
        ],
        exception_handlers={TaskError: fail, SoloError: fail},
    )


async def _read(request: Request) -> dict[str, Any]:
    try:
        content = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise TaskError(f"the request is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise TaskError("the request is not a JSON object")
    return content


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves the back end."""
    parser = argparse.ArgumentParser(prog="python -m integrations.label_studio")
    add = parser.add_argument
    add("--url", default="http://localhost:8000", help="solo-serve (default: %(default)s)")
    add("--api-key-file", type=Path, help="file with the API key of solo-serve")
    add("--model", help="default: the server's")
    add("--score-threshold", type=float, help="default: the model's")
    add("--label-studio-url", default="http://localhost:8080", help="default: %(default)s")
    add("--token-file", type=Path, help="file with an access token of Label Studio")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=9090, help="default: %(default)s")
    parsed = parser.parse_args(arguments)
    files = (parsed.api_key_file, parsed.token_file)
    key, token = (None if file is None else file.read_text().strip() for file in files)
    options = {"model": parsed.model, "score_threshold": parsed.score_threshold}
    with Client(parsed.url, api_key=key) as client:
        backend = LabelStudioBackend(client, parsed.label_studio_url, token, options)
        uvicorn.run(build_app(backend), host=parsed.host, port=parsed.port)


if __name__ == "__main__":
    main()
