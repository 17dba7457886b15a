from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import httpx
import pytest

import solo_client
from service.engines.base import BackendOptions
from service.jobs.errors import ImageUnusable, RunFailed
from service.models.repository import load_version
from service.predict.predictors import LocalPredictor, RemotePredictor
from service.work.request import RequestOptions
from tests.service.http.routes.test_warnings import STRIPES, USUAL, add_domain
from tests.solo_client.fake_server import line, progress
from tests.support.blob_model import draw_picture, encode_picture, poisoned_picture, publish

EMPTY = {"model": "blobs", "version": 1, "task": "contour", "results": [], "timing_ms": {}}
FOUND = {"width": 4, "height": 3, "instances": [], "file_name": None}
Step = httpx.Response | Exception


def build_remote(
    *steps: Step, asked: RequestOptions | None = None
) -> tuple[RemotePredictor, list[httpx.Request]]:
    """A predictor whose server answers with these."""
    waiting = list(steps)
    requests: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        step = waiting.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    client = solo_client.Client(
        "http://test",
        transport=httpx.MockTransport(answer),
        retry=solo_client.Retry(attempts=3, backoff_s=0),
    )
    return RemotePredictor(client, asked or RequestOptions(), "blobs"), requests


def error(status: int, code: str, retry_after: str | None = None) -> httpx.Response:
    body = {"error": {"code": code, "message": "why"}}
    headers = {} if retry_after is None else {"retry-after": retry_after}
    return httpx.Response(status, json=body, headers=headers)


def test_a_busy_server_is_asked_again() -> None:
    busy = [error(503, "overloaded", retry_after="0") for _ in range(2)]
    good = httpx.Response(200, json={**EMPTY, "results": [FOUND]})
    predictor, requests = build_remote(*busy, good, asked=RequestOptions(score_threshold=0.5))
    answer = predictor.predict(b"data")
    assert (answer.results, answer.task, answer.served) == ([], "contour", "blobs:1")
    assert [str(request.url) for request in requests] == [
        "http://test/segment?model=blobs&score_threshold=0.5"
    ] * 3


@pytest.mark.parametrize(
    "step",
    [
        error(415, "unsupported_format"),
        error(413, "body_too_large"),
        error(413, "too_many_images"),
        error(500, "engine_error"),
        error(500, "internal_error"),
        error(400, "empty_body"),
        error(400, "invalid_multipart"),
        error(422, "an_unknown_code"),
        error(504, "deadline_exceeded"),
        httpx.Response(400, text="a proxy's page"),
        httpx.Response(403, text="a firewall's page"),
        httpx.Response(413, text="a proxy's page"),
        httpx.Response(500, text="Internal Server Error"),
        httpx.ReadTimeout("slow"),
        httpx.Response(200, json=EMPTY),
    ],
)
def test_what_is_an_images_fault_is_its_alone(step: Step) -> None:
    predictor, _ = build_remote(step)
    with pytest.raises(ImageUnusable):
        predictor.predict(b"data")


@pytest.mark.parametrize(
    "steps",
    [
        [error(404, "unknown_model")],
        [error(401, "unauthorized")],
        [error(422, "invalid_parameter")],
        [error(403, "forbidden")],
        [error(404, "not_found")],
        [error(503, "model_unavailable")],
        [httpx.Response(401, text="a proxy's page")],
        [httpx.Response(404, text="another server's page")],
        [httpx.Response(407, text="a proxy's page")],
        [httpx.Response(301, headers={"location": "https://test/"})],
        [error(503, "overloaded", retry_after="0") for _ in range(3)],
        [httpx.ConnectError("refused") for _ in range(3)],
    ],
)
def test_what_would_fail_every_image_ends_the_run(steps: list[Step]) -> None:
    predictor, requests = build_remote(*steps)
    with pytest.raises(RunFailed):
        predictor.predict(b"data")
    assert len(requests) == len(steps)


@pytest.mark.parametrize("status", [502, 504])
def test_a_proxy_that_finds_no_server_ends_the_run(status: int) -> None:
    predictor, requests = build_remote(*[httpx.Response(status, text="a page")] * 3)
    with pytest.raises(RunFailed, match=str(status)):
        predictor.predict(b"data")
    assert requests


def test_a_model_in_this_process_finds_names_and_survives(tmp_path: Path) -> None:
    folder = publish(tmp_path, "wide", poisonable=True)
    options = BackendOptions(device="cpu", threads=1)
    predictor = LocalPredictor(load_version(folder, None, options), RequestOptions())
    answer = predictor.predict(encode_picture(draw_picture()))
    assert [r["category"] for r in answer.results] == ["red"]
    assert (answer.task, answer.served) == ("segmentation", "wide:1")
    with pytest.raises(ImageUnusable, match="unsupported_format"):
        predictor.predict(b"no image")
    with pytest.raises(ImageUnusable, match="engine_error"):
        predictor.predict(encode_picture(poisoned_picture()))


def test_progress_truncation_and_warnings_of_the_server_are_passed_on() -> None:
    warnings = [{"code": "unusual_image", "message": "why"}]
    found = {**FOUND, "truncated": True, "warnings": warnings}
    lines = [progress(1, 4, 2.0), line(result={**EMPTY, "results": [found]})]
    headers = {"content-type": "application/x-ndjson"}
    predictor, _ = build_remote(httpx.Response(200, headers=headers, content=b"".join(lines)))
    seen: list[solo_client.Progress] = []
    answer = replace(predictor, on_progress=seen.append).predict(b"data")
    assert answer.truncated and answer.warnings == warnings
    assert [(p.done, p.total) for p in seen] == [(1, 4)]


def test_a_model_in_this_process_warns_as_the_server_does(tmp_path: Path) -> None:
    folder = publish(tmp_path)
    add_domain(folder)
    model = load_version(folder, None, BackendOptions(device="cpu", threads=1))
    predictor = LocalPredictor(model, RequestOptions())
    usual, unusual = (predictor.predict(encode_picture(p)) for p in (USUAL, STRIPES))
    assert usual.warnings == []
    (warning,) = unusual.warnings
    assert warning["code"] == "unusual_image" and "'blobs'" in warning["message"]


def test_a_model_in_this_process_reports_when_the_limit_is_reached(tmp_path: Path) -> None:
    model = load_version(publish(tmp_path), None, BackendOptions(device="cpu", threads=1))
    two = encode_picture(draw_picture(48, 64, {"red": (4, 8, 12, 16), "blue": (30, 30, 10, 10)}))
    for limit, count, truncated in ((1, 1, True), (2, 2, True), (3, 2, False), (None, 2, False)):
        answer = LocalPredictor(model, RequestOptions(max_instances=limit)).predict(two)
        assert (len(answer.results), answer.truncated) == (count, truncated)
