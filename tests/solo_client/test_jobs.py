from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from solo_client import AsyncClient, Client, ImageFailed, RequestRefused, Result, Retry
from solo_client import jobs as module
from solo_client.errors import UnexpectedAnswer
from tests.solo_client.conftest import INSTANCE, found

URL = "http://server"
Answer = tuple[int, Any]


def status(state: str = "done", job: str = "j1") -> dict[str, Any]:
    return {"id": job, "state": state, "files": {"total": 3, "done": 1, "failed": 1}}


class Server:
    """Answers with what it is given, one after another; keeps the requests."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        code, content = self._answers.pop(0)
        return httpx.Response(code, content=b"" if content is None else json.dumps(content))


def ask(act: Callable[[Client], Any], *answers: Answer, retry: Retry | None = None) -> Any:
    server = Server(*answers)
    transport = httpx.MockTransport(server)
    with Client(URL, transport=transport, retry=retry or Retry(backoff_s=0)) as client:
        return act(client), server.requests


def test_images_are_sent_with_their_options() -> None:
    job, (request,) = ask(
        lambda client: client.submit_job(
            [b"one", b"two"], webhook="http://hook/", model="m", masks=False, idempotency_key="k"
        ),
        (202, status("queued")),
    )
    assert (job.id, job.state, job.total, job.done, job.failed) == ("j1", "queued", 3, 1, 1)
    assert not job.is_done and job.content["files"]["total"] == 3
    assert request.url.path == "/v2/jobs" and request.headers["idempotency-key"] == "k"
    assert dict(request.url.params) == {"webhook": "http://hook/", "model": "m", "masks": "none"}
    assert request.content.count(b'name="images"') == 2


def test_a_single_image_is_a_form_too() -> None:
    _, (request,) = ask(lambda client: client.submit_job([b"one"]), (202, status()))
    assert request.headers["content-type"].startswith("multipart/form-data")


def test_inputs_are_named() -> None:
    uris = ["file:///data/", "s3://bucket/*.png"]
    _, (request,) = ask(lambda client: client.submit_job(inputs=uris), (202, status()))
    assert json.loads(request.content) == {"inputs": uris}


def test_a_retry_has_the_same_key() -> None:
    busy = (503, {"error": {"code": "", "message": "proxy"}})
    _, requests = ask(lambda client: client.submit_job([b"one"]), busy, busy, (202, status()))
    keys = [request.headers["idempotency-key"] for request in requests]
    assert len(keys) == 3 and len(set(keys)) == 1
    _, (other,) = ask(lambda client: client.submit_job([b"one"]), (202, status()))
    assert other.headers["idempotency-key"] != keys[0]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({}, ValueError, "either images"),
        ({"images": [b"x"], "inputs": ["file:///x"]}, ValueError, "either images"),
        ({"inputs": "file:///x"}, TypeError, "a list of URIs"),
        ({"images": b"x"}, TypeError, "several images"),
        ({"images": [b"x"], "zoom": 3}, TypeError, "unknown options"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ask(lambda client: client.submit_job(**arguments))


def test_waiting_ends_when_the_job_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.0)
    waiting = (200, status("running"))
    job, requests = ask(lambda c: c.wait_for_job("j/1"), waiting, waiting, (200, status()))
    assert job.is_done and len(requests) == 3
    assert requests[0].url.raw_path == b"/v2/jobs/j%2F1"
    with pytest.raises(TimeoutError, match="j1 is not done after 0 s: 2 of 3 files"):
        ask(lambda client: client.wait_for_job("j1", timeout_s=0), waiting)


def test_results_and_errors_of_files() -> None:
    entries = [
        {"number": 1, **found(INSTANCE, file_name="a.png"), "model": "m", "version": 2},
        {"number": 2, "file_name": "b.png", "error": {"code": "corrupt_image", "message": "no"}},
    ]
    results, (request,) = ask(lambda c: c.read_job("j1"), (200, {"id": "j1", "results": entries}))
    assert request.url.path == "/v2/jobs/j1/results"
    good, bad = results
    assert isinstance(good, Result) and (good.file_name, good.model, good.version) == (
        *("a.png", "m"),
        2,
    )
    assert good.instances[0].mask.sum() == 6
    assert isinstance(bad, ImageFailed) and (bad.index, bad.code) == (1, "corrupt_image")


def test_all_pages_of_the_list_are_read() -> None:
    pages = [{"jobs": [status(job="j2")], "next": "j2"}, {"jobs": [status()], "next": None}]
    jobs, requests = ask(lambda client: client.list_jobs(), *((200, page) for page in pages))
    assert [job.id for job in jobs] == ["j2", "j1"]
    assert [dict(request.url.params) for request in requests] == [{}, {"before": "j2"}]


def test_a_job_is_deleted() -> None:
    _, (request,) = ask(lambda client: client.delete_job("j1"), (204, None))
    assert (request.method, request.url.path) == ("DELETE", "/v2/jobs/j1")
    with pytest.raises(RequestRefused, match="unknown_job"):
        ask(lambda c: c.delete_job("j1"), (404, {"error": "no job", "code": "unknown_job"}))


@pytest.mark.parametrize("content", [{}, [], {"id": "x", "files": {}}, {"results": [{}]}])
def test_what_is_no_answer_is_said(content: Any) -> None:
    for act in (
        lambda client: client.show_job("j1"),
        lambda client: client.list_jobs(),
        lambda client: client.read_job("j1"),
    ):
        with pytest.raises(UnexpectedAnswer, match="not an answer of solo-serve"):
            ask(act, (200, content))


async def test_the_asynchronous_client_has_the_same() -> None:
    answers = [(202, status("queued")), (200, status("queued")), (200, status())]
    results = (200, {"results": [found(INSTANCE, file_name="a.png")]})
    server = Server(*answers, results, (200, {"jobs": [status()], "next": None}), (204, None))
    async with AsyncClient(URL, transport=httpx.MockTransport(server)) as client:
        job = await client.submit_job([b"one"])
        assert (await client.wait_for_job(job.id)).is_done
        assert len(await client.read_job(job.id)) == 1
        assert len(await client.list_jobs()) == 1
        await client.delete_job(job.id)
    assert [request.method for request in server.requests] == ["POST", *["GET"] * 4, "DELETE"]
