from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from solo_client import (
    AsyncClient,
    Busy,
    Client,
    ConnectionFailed,
    ImageFailed,
    ImageInput,
    RequestRefused,
    Result,
    Retry,
    ServerFailed,
    SoloError,
    TimedOut,
    UnexpectedAnswer,
)
from tests.solo_client.conftest import INSTANCE, answer, found

URL = "http://test"
GOOD = httpx.Response(200, json=answer(found(INSTANCE)))
Step = httpx.Response | Exception


class Script:
    """Answers requests one after the other, and keeps them."""

    def __init__(self, *steps: Step) -> None:
        self.steps = list(steps)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        step = self.steps.pop(0)
        if isinstance(step, Exception):
            raise step
        return httpx.Response(step.status_code, headers=step.headers, content=step.content)

    @property
    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the clients would have slept."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setattr("asyncio.sleep", sleep)
    return slept


def busy(retry_after: str | None = "1", status: int = 503) -> httpx.Response:
    headers = {} if retry_after is None else {"retry-after": retry_after}
    body = {"error": {"code": "overloaded", "message": "full"}}
    return httpx.Response(status, json=body, headers={**headers, "x-request-id": "r1"})


def refuse(status: int, code: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"code": code, "message": "why"}})


def segment_sync(script: Script, image: Any = b"file", **options: Any) -> Result:
    with Client(URL, transport=script.transport) as client:
        return client.segment(image, **options)


def segment_async(script: Script, image: Any = b"file", **options: Any) -> Result:
    async def ask() -> Result:
        async with AsyncClient(URL, transport=script.transport) as client:
            return await client.segment(image, **options)

    return asyncio.run(ask())


both = pytest.mark.parametrize("segment", [segment_sync, segment_async])
Segment = Callable[..., Result]


@both
def test_an_answer_becomes_a_result(segment: Segment, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"file")
    script = Script(GOOD)
    result = segment(script, tmp_path / "a.png")
    (request,) = script.requests
    assert (request.method, str(request.url), request.content) == (
        "POST",
        f"{URL}/segment",
        b"file",
    )
    assert request.headers["content-type"] == "application/octet-stream"
    assert "x-api-key" not in request.headers
    assert (result.file_name, result.width, result.height) == ("a.png", 4, 3)
    assert (result.model, result.version, result.task) == ("blobs", 2, "segmentation")
    assert result.timing_ms == {"total": 1.5}
    (instance,) = result.instances
    assert (instance.category, instance.bbox_xywh, instance.area) == ("red", (1, 0, 2, 3), 6)


@both
def test_options_become_the_query(segment: Segment) -> None:
    script = Script(GOOD)
    options = {"model": "blobs", "version": 2, "score_threshold": 0.5, "max_instances": None}
    segment(script, masks=False, query={"timeout_ms": 500}, **options)
    assert dict(script.requests[0].url.params) == {
        "model": "blobs",
        "version": "2",
        "score_threshold": "0.5",
        "masks": "none",
        "timeout_ms": "500",
    }


@both
def test_a_busy_server_is_asked_again(segment: Segment, waits: list[float]) -> None:
    script = Script(busy("1"), httpx.ConnectError("no route"), busy("2", 429), GOOD)
    assert segment(script).instances
    assert waits == [1.5, 1.0, 4.0]
    assert [request.content for request in script.requests] == [b"file"] * 4


@both
@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_proxy_that_cannot_reach_the_server_is_asked_again(
    segment: Segment, status: int, waits: list[float]
) -> None:
    page = httpx.Response(status, html="<html>")
    later = httpx.Response(status, html="<html>", headers={"retry-after": "3"})
    script = Script(page, later, GOOD)
    assert segment(script).instances
    assert waits == [0.5, 4.0]
    script = Script(*[page] * 9)
    with pytest.raises(Busy, match=f"HTTP status {status}: ") as caught:
        segment(script)
    assert len(script.requests) == Retry().attempts
    assert (caught.value.status, caught.value.code) == (status, "")


@both
@pytest.mark.parametrize("wanted", ["31", "9" * 400, "Tue, 01 Jan 2999 00:00:00 GMT"])
def test_a_server_that_wants_a_long_wait_is_not_waited_for(
    segment: Segment, wanted: str, waits: list[float]
) -> None:
    with pytest.raises(Busy) as caught:
        segment(Script(busy(wanted)))
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s >= 31
    assert waits == []


@both
@pytest.mark.parametrize("step", [busy("0"), httpx.ReadError("reset")])
def test_it_gives_up_after_the_last_attempt(
    segment: Segment, step: Step, waits: list[float]
) -> None:
    script = Script(*[step] * 9)
    with pytest.raises((Busy, ConnectionFailed)) as caught:
        segment(script)
    assert len(script.requests) == Retry().attempts == len(waits) + 1
    if isinstance(caught.value, Busy):
        assert (caught.value.status, caught.value.code) == (503, "overloaded")
        assert caught.value.request_id == "r1"
    else:
        assert URL in str(caught.value)
        assert isinstance(caught.value.__cause__, httpx.ReadError)


@both
@pytest.mark.parametrize(
    ("step", "kind", "text"),
    [
        (refuse(404, "unknown_model"), RequestRefused, "unknown_model: why"),
        (refuse(500, "internal_error"), ServerFailed, "internal_error: why"),
        (refuse(503, "model_unavailable"), Busy, "model_unavailable: why"),
        (refuse(415, "unsupported_format"), ImageFailed, "image 0: unsupported_format: why"),
        (refuse(500, "engine_error"), ImageFailed, "engine_error"),
        (refuse(504, "deadline_exceeded"), ServerFailed, "deadline_exceeded: why"),
        (refuse(400, "empty_body"), ImageFailed, "image 0: empty_body: why"),
        (httpx.Response(500, text="<html>"), ServerFailed, "HTTP status 500: Internal Server"),
        (
            httpx.Response(301, headers={"location": "https://other/segment"}),
            ServerFailed,
            "status 301: .*'https://other/segment'; redirects are not followed",
        ),
        (httpx.Response(304), ServerFailed, "status 304"),
        (httpx.Response(407, text="<html>"), RequestRefused, "status 407: Proxy Authentication"),
        (httpx.DecodingError("bad gzip"), UnexpectedAnswer, f"{URL}: bad gzip"),
        (
            httpx.Response(200, html="<html>Log in"),
            UnexpectedAnswer,
            r"status 200, text/html; charset=utf-8\): '<html>Log in'",
        ),
        (httpx.Response(204), UnexpectedAnswer, "status 204, no content type"),
        (httpx.Response(200, content=b"[" * 200_000), UnexpectedAnswer, "not an answer"),
        (httpx.Response(200, content=b"\xff\xfe{}"), UnexpectedAnswer, "not an answer"),
        (httpx.Response(200, json="results"), UnexpectedAnswer, "not an answer"),
        (httpx.Response(404, json={"error": "t", "code": "c"}), RequestRefused, "c: t"),
        (httpx.Response(404, json=[1]), RequestRefused, "HTTP status 404"),
        (httpx.ReadTimeout("slow"), TimedOut, f"{URL}: slow"),
        (httpx.Response(200, text="hello"), UnexpectedAnswer, "hello"),
        (httpx.Response(200, json={"results": []}), UnexpectedAnswer, "not an answer"),
        (httpx.Response(200, json=answer()), UnexpectedAnswer, "not an answer"),
        (httpx.Response(200, json=[]), UnexpectedAnswer, "not an answer"),
    ],
)
def test_what_cannot_be_helped_is_raised_at_once(
    segment: Segment, step: Step, kind: type[SoloError], text: str, waits: list[float]
) -> None:
    script = Script(step)
    with pytest.raises(kind, match=text) as caught:
        segment(script)
    assert type(caught.value) is kind
    assert waits == []


def test_several_images_have_results_and_errors_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"first")
    bad = {"file_name": "image_1", "error": {"code": "corrupt_image", "message": "it is cut"}}
    steps = [httpx.Response(200, json=answer(found(INSTANCE), bad, found()))] * 2
    script = Script(*steps)
    images: list[ImageInput] = [tmp_path / "a.png", b"second", b"third"]
    with Client(URL, transport=script.transport) as client:
        results = client.segment_many(images)
        assert client.segment_many([]) == []

    async def ask() -> list[Result | ImageFailed]:
        async with AsyncClient(URL, transport=script.transport) as client:
            assert await client.segment_many([]) == []
            return await client.segment_many(images)

    for one, failed, other in (results, asyncio.run(ask())):
        assert isinstance(one, Result)
        assert isinstance(other, Result)
        assert (one.file_name, len(one.instances)) == ("a.png", 1)
        assert (other.file_name, len(other.instances)) == (None, 0)
        assert isinstance(failed, ImageFailed)
        assert (failed.index, failed.code, failed.message) == (1, "corrupt_image", "it is cut")
    body = script.requests[0].content
    assert body.count(b'name="images"') == 3
    assert b'filename="a.png"' in body
    assert b'filename="image_1"' in body


def test_one_bad_image_of_one_is_a_result_too() -> None:
    script = Script(refuse(422, "corrupt_image"), refuse(404, "unknown_model"))
    with Client(URL, transport=script.transport) as client:
        (failed,) = client.segment_many([b"file"])
        assert isinstance(failed, ImageFailed)
        assert failed.code == "corrupt_image"
        with pytest.raises(RequestRefused, match="unknown_model"):
            client.segment_many([b"file"])


def test_the_key_is_sent() -> None:
    script = Script(GOOD)
    with Client(URL, api_key="secret", transport=script.transport) as client:
        client.segment(b"file")
    assert script.requests[0].headers["x-api-key"] == "secret"


@both
@pytest.mark.parametrize("error", [httpx.ConnectError("no webhook"), Busy(503, "", "elsewhere")])
def test_an_error_of_the_callback_is_never_taken_for_one_of_the_server(
    segment: Segment, error: Exception, waits: list[float]
) -> None:
    def stop(progress: Any) -> None:
        raise error

    line = b'{"progress": {"canvases": 2, "canvases_done": 1, "elapsed_s": 1}}\n'
    headers = {"content-type": "application/x-ndjson"}
    with pytest.raises(type(error)) as caught:
        segment(Script(httpx.Response(200, content=line, headers=headers)), on_progress=stop)
    assert caught.value is error
    assert waits == []


@both
@pytest.mark.parametrize("size", [2**20, 2**20 + 1])
def test_a_page_of_an_error_is_read_up_to_a_bound(segment: Segment, size: int) -> None:
    page = httpx.Response(404, content=b"x" * size)
    kind = RequestRefused if size == 2**20 else UnexpectedAnswer
    with pytest.raises(kind, match="404" if kind is RequestRefused else "it is too long"):
        segment(Script(page))


@both
def test_no_proxy_may_compress_the_progress(segment: Segment) -> None:
    script = Script(GOOD)
    segment(script)
    assert script.requests[0].headers["accept-encoding"] == "identity"


def test_readiness_and_models() -> None:
    models = {"models": [{"name": "blobs", "state": "READY", "version": 2}]}
    ready: list[Step] = [httpx.Response(200), httpx.Response(503), httpx.ConnectError("no")]
    steps: list[Step] = [*ready, httpx.Response(200, json=models), httpx.Response(200, json=[])]

    with Client(URL, transport=Script(*steps).transport) as client:
        assert [client.is_ready() for _ in ready] == [True, False, False]
        assert client.list_models() == models["models"]
        with pytest.raises(UnexpectedAnswer):
            client.list_models()

    async def ask() -> None:
        async with AsyncClient(URL, transport=Script(*steps).transport) as client:
            assert [await client.is_ready() for _ in ready] == [True, False, False]
            assert await client.list_models() == models["models"]

    asyncio.run(ask())


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="localhost:8000"):
        Client("localhost:8000")
    with pytest.raises(TypeError, match="treshold"):
        segment_sync(Script(), treshold=0.5)
    with pytest.raises(FileNotFoundError):
        segment_sync(Script(), "missing.png")


def test_a_base_path_is_kept() -> None:
    script = Script(GOOD)
    with Client("http://test/solo/", transport=script.transport) as client:
        client.segment(b"file")
    assert script.requests[0].url.path == "/solo/segment"


def test_a_model_is_described() -> None:
    model = {"name": "a/b", "classes": [{"category_id": 1, "name": "cell"}]}

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url.raw_path in (b"/v2/models/a%2Fb", b"/v2/models/a%2Fb/versions/2")
        return httpx.Response(200, json=model if b"versions" in request.url.raw_path else [1])

    transport = httpx.MockTransport(answer)
    with Client(URL, transport=transport) as client:
        assert client.describe_model("a/b", 2) == model
        with pytest.raises(UnexpectedAnswer):
            client.describe_model("a/b")

    async def ask() -> None:
        async with AsyncClient(URL, transport=transport) as client:
            assert await client.describe_model("a/b", 2) == model

    asyncio.run(ask())


def test_images_become_a_file() -> None:
    file = {"file_name": "a.csv", "media_type": "text/csv", "base64": "YSxi"}

    def answer(request: httpx.Request) -> httpx.Response:
        assert dict(request.url.params) == {"format": "csv", "priority": "batch", "model": "m"}
        return httpx.Response(200, json=file)

    query = {"priority": "batch"}
    with Client(URL, transport=httpx.MockTransport(answer)) as client:
        found = client.segment_to_file([b"image"], "csv", model="m", query=query)
        assert (found.name, found.media_type, found.data) == ("a.csv", "text/csv", b"a,b")
        file["base64"] = "?"
        with pytest.raises(UnexpectedAnswer):
            client.segment_to_file([b"image"], "csv", model="m", query=query)
        with pytest.raises(ValueError, match="there are no images"):
            client.segment_to_file([], "csv")
    file["base64"] = "YSxi"

    async def ask() -> None:
        async with AsyncClient(URL, transport=httpx.MockTransport(answer)) as client:
            found = await client.segment_to_file([b"image"], "csv", model="m", query=query)
            assert found.data == b"a,b"

    asyncio.run(ask())
