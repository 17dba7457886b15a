"""Answers of the server: plain JSON, or a stream of JSON lines with progress."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

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
from solo_client.result import Instance, Result, ResultFile, ResultWarning
from solo_client.retry import read_retry_after

IMAGE_CODES = frozenset(
    (
        *("empty_body", "empty_image", "unsupported_format"),
        *("image_too_large", "corrupt_image", "engine_error"),
    )
)
"""Errors of a single image, not of the request; a request with one empty file has an empty body."""
MISFITS = (ValueError, KeyError, TypeError, AttributeError, OverflowError)
"""What reading a field raises that is missing or of another type."""
_MAX_ANSWER_BYTES = 2**30
_MAX_ERROR_BYTES = 2**20


@dataclass(frozen=True)
class Progress:
    """How far the server is with a request.

    Attributes:
        done: Canvases (model inputs of a fixed size that images are cut into) that are finished.
        total: Canvases of all images of the request.
        elapsed_s: Time since the server admitted the request.
        remaining_s: Estimate from the rate so far; None before the first canvas is finished.
    """

    done: int
    total: int
    elapsed_s: float
    remaining_s: float | None


OnProgress = Callable[[Progress], None]


class AnswerParser:
    """Parses the answer to one attempt of a request; does no I/O.

    Args:
        response: Status and headers; the body is passed to `feed`.
        on_progress: Called for each progress line.

    Attributes:
        raised_by_callback: The exception of `on_progress`, which ends the request.
    """

    def __init__(self, response: httpx.Response, on_progress: OnProgress | None) -> None:
        self._response = response
        self._on_progress = on_progress
        content_type = response.headers.get("content-type", "").partition(";")[0].strip()
        self._is_stream = response.is_success and content_type == "application/x-ndjson"
        self._pieces: list[bytes] = []
        self._room_bytes = _MAX_ANSWER_BYTES if response.is_success else _MAX_ERROR_BYTES
        self._waited_s = 0.0  # last time at which no canvas was finished
        self._last: dict[str, Any] | None = None
        self.raised_by_callback: BaseException | None = None

    def feed(self, chunk: bytes) -> None:
        """Takes a part of the body.

        Raises:
            UnexpectedAnswer: A line that is not one of solo-serve, or a body beyond any answer.
        """
        self._room_bytes -= len(chunk)
        if self._room_bytes < 0:
            raise self._unexpected([*self._pieces, chunk][0], "it is too long")
        if not self._is_stream:
            self._pieces.append(chunk)
            return
        first, *others = chunk.split(b"\n")
        self._pieces.append(first)
        for piece in others:
            self._read_line(b"".join(self._pieces))
            self._pieces = [piece]

    def finish(self) -> Any:
        """The content of the complete answer, from JSON.

        Raises:
            ServerError: The server answered with an error.
            ConnectionFailed: A stream ended without its last line.
            UnexpectedAnswer: It is not an answer of solo-serve.
        """
        data = b"".join(self._pieces)
        if not self._response.is_success:
            raise read_failure(self._response, data)
        is_deleted = self._response.status_code == httpx.codes.NO_CONTENT
        if is_deleted and self._response.request.method == "DELETE":
            return None
        if not self._is_stream:
            try:
                return _load_json(data)
            except ValueError as error:
                raise self._unexpected(data) from error
        with suppress(UnexpectedAnswer):  # a line that was cut, or the last one without a newline
            self._read_line(data)
        if self._last is None:
            raise ConnectionFailed(f"{self._response.url}: the answer ended before its result")
        if "result" in self._last:
            return self._last["result"]
        raise self._read_error(self._last)

    def _read_line(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            content = dict(_load_json(line))
            progress = self._read_progress(content["progress"]) if "progress" in content else None
            if progress is None and not content.keys() & {"result", "error"}:
                raise ValueError("an unknown kind of line")
        except MISFITS as error:
            raise self._unexpected(line) from error
        if progress is None:
            self._last = content
        elif self._on_progress is not None:
            try:
                self._on_progress(progress)
            except BaseException as error:
                self.raised_by_callback = error
                raise

    def _read_progress(self, content: Mapping[str, Any]) -> Progress:
        done, total = int(content["canvases_done"]), int(content["canvases"])
        elapsed_s = float(content["elapsed_s"])
        if done == 0:
            self._waited_s = elapsed_s
            return Progress(done, total, elapsed_s, None)
        canvas_s = max(0.0, elapsed_s - self._waited_s) / done
        return Progress(done, total, elapsed_s, canvas_s * (total - done))

    def _read_error(self, line: Mapping[str, Any]) -> ServerError:
        """The error of a stream's last line.

        After the request was admitted, a 503 is temporary even without a time to retry at.
        """
        try:
            return build_error(
                int(line["status"]),
                str(line["error"]["code"]),
                str(line["error"]["message"]),
                request_id=self._response.headers.get("x-request-id"),
                retry_after_s=float(line.get("retry_after_s", 0)),
            )
        except MISFITS as error:
            raise self._unexpected(json.dumps(line).encode()) from error

    def _unexpected(self, data: bytes, reason: str = "") -> UnexpectedAnswer:
        start = data[:100].decode("utf-8", "replace")
        kind = self._response.headers.get("content-type", "no content type")
        return UnexpectedAnswer(
            f"{self._response.url}: not an answer of solo-serve (status "
            f"{self._response.status_code}, {kind}{reason and ', '}{reason}): {start!r}"
        )


def _load_json(data: bytes) -> Any:
    """Parses JSON; any fault is a ValueError."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_results(content: Any, names: Sequence[str | None], url: str) -> list[Result | ImageFailed]:
    """The results of POST /segment, in the order of the images, whose file names are given.

    Raises:
        UnexpectedAnswer: The content does not fit the request.
    """
    try:
        common = {
            "model": str(content["model"]),
            "version": int(content["version"]),
            "task": str(content.get("task", "segmentation")),
            "timing_ms": content.get("timing_ms", {}),
        }
        return [
            read_result(index, name, entry, common)
            for index, (name, entry) in enumerate(zip(names, content["results"], strict=True))
        ]
    except MISFITS as error:
        raise not_ours(url, content, error) from error


def read_result(
    index: int, name: str | None, entry: Mapping[str, Any], common: Mapping[str, Any]
) -> Result | ImageFailed:
    """The result of an image, or its error.

    Args:
        index: Of the image.
        name: Its file name.
        entry: What the answer says of it.
        common: Further fields of the result.
    """
    if entry.get("error") is not None:
        error = entry["error"]
        return ImageFailed(index, name, str(error["code"]), str(error["message"]))
    instances = tuple(
        Instance(
            category_id=int(found["category_id"]),
            category=str(found["category"]),
            score=float(found["score"]),
            bbox_xywh=_read_box(found["bbox"]),
            area=int(found["area"]),
            rle=found.get("segmentation"),
        )
        for found in entry["instances"]
    )
    return Result(
        name,
        int(entry["height"]),
        int(entry["width"]),
        instances,
        **common,
        canvases=entry.get("canvases"),
        instances_found=entry.get("instances_found"),
        truncated=bool(entry.get("truncated", False)),
        scale=entry.get("scale"),
        warnings=tuple(
            ResultWarning(str(warning["code"]), str(warning["message"]))
            for warning in entry.get("warnings") or ()
        ),
    )


def _read_box(values: Any) -> tuple[float, float, float, float]:
    left, top, width, height = values
    if not all(isinstance(value, (int, float)) for value in values):
        raise ValueError(f"bbox {values}")
    return left, top, width, height


def blame_image(error: ServerError, names: Sequence[str | None]) -> list[Result | ImageFailed]:
    """The result for a single image that the server refused; raises any other error again."""
    if len(names) != 1 or error.code not in IMAGE_CODES:
        raise error
    failed = ImageFailed(0, names[0], error.code, error.message)
    failed.__cause__ = error
    return [failed]


def only_result(results: list[Result | ImageFailed]) -> Result:
    """The only image's; raises its error if it failed."""
    (result,) = results
    if isinstance(result, ImageFailed):
        raise result
    return result


def read_models(content: Any, url: str) -> list[dict[str, Any]]:
    """The list of models of GET /v2/models.

    Raises:
        UnexpectedAnswer: The content has no list of models.
    """
    try:
        models: list[dict[str, Any]] = content["models"]
    except MISFITS as error:
        raise not_ours(url, content, error) from error
    return models


def read_file(content: Any, url: str) -> ResultFile:
    """The file of POST /segment with an output format.

    Raises:
        UnexpectedAnswer: It is not one, e.g. of a server that has no formats.
    """
    try:
        data = base64.b64decode(content["base64"], validate=True)
        return ResultFile(str(content["file_name"]), str(content["media_type"]), data)
    except MISFITS as error:
        raise not_ours(url, content, error) from error


def read_model(content: Any, url: str) -> dict[str, Any]:
    """The description of GET /v2/models/{name}.

    Raises:
        UnexpectedAnswer: It is not one.
    """
    try:
        model: dict[str, Any] = {**content, "name": str(content["name"])}
    except MISFITS as error:
        raise not_ours(url, content, error) from error
    return model


def not_ours(url: str, content: Any, error: Exception) -> UnexpectedAnswer:
    """The error for an answer that does not fit, with its beginning."""
    start = json.dumps(content)[:100]
    return UnexpectedAnswer(f"{url}: not an answer of solo-serve ({error!r}): {start!r}")


def read_failure(response: httpx.Response, data: bytes) -> ServerError:
    """The error that an answer with a status other than 2xx stands for.

    Args:
        response: Status and headers.
        data: The body.
    """
    code, message = "", response.reason_phrase
    if response.has_redirect_location:
        target = response.headers["location"]
        message = f"{message}: the server is at {target!r}; redirects are not followed"
    try:
        body = _load_json(data)
        error = body["error"]
        if isinstance(error, dict):
            code, message = str(error["code"]), str(error["message"])
        else:  # under /v2: the Open Inference Protocol's format
            code, message = str(body.get("code", "")), str(error)
    except MISFITS:
        pass  # the answer of a proxy
    return build_error(
        response.status_code,
        code,
        message,
        request_id=response.headers.get("x-request-id"),
        retry_after_s=read_retry_after(response.headers.get("retry-after")),
    )


def build_error(
    status: int, code: str, message: str, *, request_id: str | None, retry_after_s: float | None
) -> ServerError:
    """The error for an HTTP status; solo-serve's own errors have a code, a proxy's have none."""
    if status in (429, 503) or (status in (502, 504) and not code):
        return Busy(status, code, message, request_id=request_id, retry_after_s=retry_after_s)
    kind = RequestRefused if 400 <= status < 500 else ServerFailed
    return kind(status, code, message, request_id=request_id)


def translate(
    error: httpx.RequestError | SoloError, route: str, timeout_s: float | None
) -> SoloError:
    """The client's error for an error of httpx, which becomes its cause.

    Args:
        error: The error.
        route: Address of the server, and of the proxy if there is one.
        timeout_s: The client's.
    """
    if isinstance(error, SoloError):
        return error
    text = f"{route}: {error or type(error).__name__}"
    failure: SoloError
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        failure = TimedOut(
            f"{text} (timeout_s={timeout_s}; a proxy that collects the answer needs a longer one)"
        )
    elif isinstance(error, httpx.TransportError):
        failure = ConnectionFailed(text)
    else:  # a body that cannot be decoded
        failure = UnexpectedAnswer(text)
    failure.__cause__ = error
    return failure
