"""Accept: application/x-ndjson: progress lines while a request is processed, then its end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.http.app import create_app
from service.http.keys import add_key
from service.http.routes import progress as progress_module
from service.http.routes.progress import ProgressResponse
from service.http.schemas import ProgressModel, SegmentResponse
from service.models.repository import load_repository
from service.protocol import Segmented
from service.settings import Settings
from service.work.request import ClientProfile, RequestProgress
from tests.service.conftest import OPTIONS
from tests.support.asgi import AsgiExchange
from tests.support.blob_model import draw_picture, encode_picture, poisoned_picture
from tests.support.gate import EngineGate
from tests.support.pictures import build_png_header, build_truncated_jpeg
from tests.support.server import CPU_FLAGS, run_server
from tests.support.slow_model import build_slow_graph, publish_graph

SMALL = encode_picture(draw_picture())
NINE = encode_picture(draw_picture(128, 128, {"red": (10, 10, 50, 60), "blue": (80, 70, 30, 40)}))
"""An image of nine canvases."""
ACCEPT = {"accept": "application/x-ndjson"}
INTERVALS_S = (progress_module.EVERY_S, progress_module.HEARTBEAT_S)

OpenGated = Callable[..., AbstractAsyncContextManager[tuple[FastAPI, EngineGate]]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """RequestProgress is looked at often, and no heartbeat comes by itself."""
    monkeypatch.setattr(progress_module, "EVERY_S", 0.005)
    monkeypatch.setattr(progress_module, "HEARTBEAT_S", 60.0)


@pytest.fixture
def open_gated(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> OpenGated:
    """Opens an application whose model `blobs` waits for the test before every canvas."""

    @asynccontextmanager
    async def open_it(**changes: Any) -> AsyncIterator[tuple[FastAPI, EngineGate]]:
        changed = settings.model_copy(update=changes)
        repository = load_repository(changed.model_repo, OPTIONS)
        gate = EngineGate(monkeypatch, repository)
        app = create_app(changed, repository)
        async with app.router.lifespan_context(app):
            try:
                yield app, gate
            finally:
                gate.let()

    return open_it


def ask(app: FastAPI, body: bytes = NINE, path: str = "/segment", **given: Any) -> AsgiExchange:
    return AsgiExchange(app, path, body, {**ACCEPT, **given.pop("headers", {})}, **given)


async def read_line(exchange: AsgiExchange) -> dict[str, Any]:
    """The next line of an answer; each is sent at once and whole."""
    chunk = await exchange.read_chunk()
    assert chunk.endswith(b"\n") and chunk.count(b"\n") == 1
    line: dict[str, Any] = json.loads(chunk)
    return line


async def read_progress(exchange: AsgiExchange, done: int) -> ProgressModel:
    """Reads lines until that many canvases are done; none of them goes back."""
    before = -1
    while True:
        line = ProgressModel.model_validate((await read_line(exchange))["progress"])
        assert before < line.canvases_done <= done
        before = line.canvases_done
        if before == done:
            return line


async def read_end(exchange: AsgiExchange) -> dict[str, Any]:
    """The last line; progress may come before it."""
    while "progress" in (line := await read_line(exchange)):
        pass
    assert await exchange.end() == [{"type": "http.response.body", "body": b"", "more_body": False}]
    return line


def lines_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.text.endswith("\n")
    return [json.loads(line) for line in response.text.splitlines()]


async def test_canvases_done_grow_to_the_total_and_the_result_is_last(
    open_gated: OpenGated,
) -> None:
    async with open_gated() as (app, gate):
        exchange = ask(app)
        status, headers = await exchange.read_status()
        assert status == 200
        assert headers["content-type"] == "application/x-ndjson"
        assert headers["cache-control"] == "no-store"
        assert headers["x-accel-buffering"] == "no"
        assert headers["vary"] == "accept"
        assert headers["x-request-id"]
        assert "content-length" not in headers
        elapsed_s = []
        for done in range(9):
            line = await read_progress(exchange, done)
            assert line.canvases == 9
            elapsed_s.append(line.elapsed_s)
            gate.let(1)
        assert elapsed_s == sorted(elapsed_s) and 0 <= elapsed_s[0] < elapsed_s[-1] < 60
        last = await read_end(exchange)
        assert set(last) == {"result"}
        answer = SegmentResponse.model_validate(last["result"])
        assert answer.canvases == 9
        assert answer.results[0].instances
        assert gate.calls == 9


async def test_the_result_is_the_answer_as_json(client: httpx.AsyncClient) -> None:
    parts = [
        ("images", ("a.png", SMALL)),
        ("images", ("b.txt", b"text")),
        ("images", ("c.png", NINE)),
    ]
    query = "/segment?masks=polygon&max_instances=1"
    *_, last = lines_of(await client.post(query, files=parts, headers=ACCEPT))
    plain = (await client.post(query, files=parts)).json()
    for body in (last["result"], plain):
        body.pop("timing_ms")
        body["cost"].pop("engine_ms")
    assert last["result"] == plain
    assert plain["results"][1]["error"]["code"] == "unsupported_format"
    assert plain["canvases"] == 10


async def test_all_images_of_a_request_count_together(open_gated: OpenGated) -> None:
    form = httpx.Request("POST", "http://test", files=[("images", NINE), ("images", SMALL)])
    async with open_gated() as (app, gate):
        exchange = ask(app, form.read(), headers={"content-type": form.headers["content-type"]})
        await exchange.read_status()
        assert (await read_progress(exchange, 0)).canvases == 10
        gate.let(9)
        assert (await read_progress(exchange, 9)).canvases == 10
        gate.let(1)
        assert (await read_end(exchange))["result"]["canvases"] == 10


async def test_without_progress_there_is_one_line(open_gated: OpenGated) -> None:
    async with open_gated() as (app, gate):
        exchange = ask(app)
        await exchange.read_status()
        await read_progress(exchange, 0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await exchange.read_chunk()
        gate.let()
        assert "result" in await read_end(exchange)


async def test_a_heartbeat_comes_without_progress(
    open_gated: OpenGated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "HEARTBEAT_S", 0.05)
    async with open_gated() as (app, gate):
        exchange = ask(app)
        await exchange.read_status()
        lines = [(await read_line(exchange))["progress"] for _ in range(5)]
        assert {line["canvases_done"] for line in lines} == {0}
        times = [line["elapsed_s"] for line in lines]
        gaps = [later - sooner for sooner, later in itertools.pairwise(times)]
        assert min(gaps) >= 0.045  # not with every look at the progress
        gate.let()
        assert "result" in await read_end(exchange)


def test_a_line_comes_at_least_every_5_s() -> None:
    assert INTERVALS_S[0] <= INTERVALS_S[1] == 5


async def test_a_request_that_is_refused_has_its_own_status(
    settings: Settings, open_gated: OpenGated
) -> None:
    async with open_gated(max_queue_canvases=4, max_image_canvases=2) as (app, _):
        admission = app.state.segmenter.admission
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            async def code_of(path: str, **sent: Any) -> tuple[int, str]:
                response = await client.post(path, headers=ACCEPT, **sent)
                assert response.headers["content-type"] == "application/json"
                return response.status_code, response.json()["error"]["code"]

            two, three = ({"files": [("images", SMALL)] * count} for count in (2, 3))
            assert await code_of("/segment", content=b"") == (400, "empty_body")
            assert await code_of("/segment?model=cats", content=SMALL) == (404, "unknown_model")
            assert await code_of("/segment?masks=x", content=SMALL) == (422, "invalid_parameter")
            assert await code_of("/segment", **three) == (413, "too_many_images")
            with admission.admit(
                ClientProfile(name="other"), [2]
            ):  # seen when the body has been read
                assert await code_of("/segment", **two) == (503, "overloaded")
                with admission.admit(ClientProfile(name="third"), [1]):  # seen before
                    assert await code_of("/segment", content=SMALL) == (503, "overloaded")
            admission.close()
            assert await code_of("/segment", content=SMALL) == (503, "draining")
        assert (admission.requests, admission.canvases) == (0, 0)


async def test_a_key_beyond_its_bounds_has_its_own_status(
    open_gated: OpenGated, tmp_path: Path
) -> None:
    key = add_key(tmp_path / "keys.json", "shop", canvases_per_minute=9)
    async with open_gated(keys_file=tmp_path / "keys.json") as (app, gate):
        gate.let()
        exchange = ask(app, headers={"x-api-key": key})
        assert (await exchange.read_status())[0] == 200
        assert "result" in await read_end(exchange)
        exchange = ask(app, headers={"x-api-key": key})
        status, headers = await exchange.read_status()
        assert status == 429
        assert int(headers["retry-after"]) > 0
        await exchange.end()


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"no image", 415, "unsupported_format"),
        (build_png_header(60_000, 60_000), 413, "image_too_large"),
        (build_png_header(1, 40_000_000), 413, "too_many_canvases"),
    ],
    ids=["format", "size", "canvases"],
)
async def test_a_single_image_that_is_refused_before_admission_has_its_own_status(
    client: httpx.AsyncClient, app: FastAPI, body: bytes, status: int, code: str
) -> None:
    refused = await client.post("/segment", content=body, headers=ACCEPT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
    assert refused.headers["content-type"] == "application/json"
    plain = await client.post("/segment", content=body)
    assert (plain.status_code, plain.json()) == (refused.status_code, refused.json())
    assert app.state.segmenter.admission.requests == 0


async def test_several_images_that_are_all_refused_are_a_result(client: httpx.AsyncClient) -> None:
    parts = [("images", ("a.txt", b"text")), ("images", ("b.png", build_png_header(1, 40_000_000)))]
    (line,) = lines_of(await client.post("/segment", files=parts, headers=ACCEPT))
    codes = [result["error"]["code"] for result in line["result"]["results"]]
    assert codes == ["unsupported_format", "too_many_canvases"]


@pytest.mark.parametrize(
    ("body", "path", "status", "code"),
    [
        (build_truncated_jpeg(), "/segment", 422, "corrupt_image"),
        (encode_picture(poisoned_picture()), "/segment?model=wide", 500, "engine_error"),
    ],
    ids=["corrupt", "engine"],
)
async def test_the_error_of_a_single_image_is_the_last_line_as_it_would_be_the_answer(
    client: httpx.AsyncClient, body: bytes, path: str, status: int, code: str
) -> None:
    *before, last = lines_of(await client.post(path, content=body, headers=ACCEPT))
    assert all(set(line) == {"progress"} for line in before)
    plain = await client.post(path, content=body)
    assert plain.status_code == status
    assert last == {**plain.json(), "status": status}
    assert last["error"]["code"] == code


async def test_a_failure_of_the_server_tells_nothing_of_itself(
    client: httpx.AsyncClient,
    app: FastAPI,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def explode(*args: object, **given: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(app.state.segmenter, "_count", explode)
    *_, last = lines_of(await client.post("/segment", content=SMALL, headers=ACCEPT))
    assert (last["status"], last["error"]["code"]) == (500, "internal_error")
    assert "secret" not in json.dumps(last)
    assert "secret detail" in caplog.text
    assert app.state.segmenter.admission.requests == 0


async def test_a_deadline_that_passes_is_the_last_line(open_gated: OpenGated) -> None:
    async with open_gated() as (app, gate):
        exchange = ask(app, path="/segment?timeout_ms=300")
        await exchange.read_status()
        gate.let(2)
        await read_progress(exchange, 2)
        line = await read_end(exchange)
        assert set(line) == {"error", "status"}
        assert (line["status"], line["error"]["code"]) == (504, "deadline_exceeded")
        assert "within 300 ms; 2 of 9 canvases were done" in line["error"]["message"]
        segmenter = app.state.segmenter
        assert (segmenter.admission.requests, segmenter.admission.canvases) == (0, 0)
        cancelled = segmenter.metrics.cancelled_images.labels("blobs", "deadline")
        assert cancelled._value.get() == 1


async def test_a_client_that_leaves_stops_the_work(
    open_gated: OpenGated, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "service.http.middleware")
    async with open_gated() as (app, gate):
        segmenter = app.state.segmenter
        exchange = ask(app)
        await exchange.read_status()
        gate.let(3)
        await read_progress(exchange, 3)
        exchange.leave()
        sent = await exchange.end()
        assert b"error" not in b"".join(message["body"] for message in sent)
        assert (segmenter.admission.requests, segmenter.admission.canvases) == (0, 0)
        assert segmenter.store.find("blobs", None).users == 0
        assert segmenter.store.find("blobs", None).scheduler.waiting == 0
        cancelled = segmenter.metrics.cancelled_images.labels("blobs", "client_left")
        assert cancelled._value.get() == 1
        assert [r.status for r in caplog.records if hasattr(r, "status")] == [499]
        left = segmenter.metrics.requests.labels("/segment", "POST", "499")
        assert left._value.get() == 1
        gate.let()
        # The engine works for others: of the image that was dropped no canvas is left.
        other = ask(app, SMALL)
        await other.read_status()
        assert "result" in await read_end(other)
        assert gate.calls <= 3 + 1 + 1
    assert [r.message for r in caplog.records if r.levelname == "ERROR" and r.exc_info] == []


async def test_a_client_that_leaves_before_admission_is_499(
    open_gated: OpenGated, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_gated() as (app, _):
        segmenter = app.state.segmenter

        async def wait_for_ever(*args: object) -> None:
            exchange.leave()
            await asyncio.Event().wait()

        monkeypatch.setattr(segmenter, "_prepare", wait_for_ever)
        exchange = ask(app)
        assert (await exchange.read_status())[0] == 499
        await exchange.end()
        assert segmenter.admission.requests == 0


async def test_the_request_counts_until_the_last_line_is_sent(open_gated: OpenGated) -> None:
    """A server that drains waits for it, and its model stays."""
    async with open_gated() as (app, gate):
        segmenter = app.state.segmenter
        exchange = ask(app)
        await exchange.read_status()
        await read_progress(exchange, 0)
        model = segmenter.store.find("blobs", None)
        assert (segmenter.admission.requests, model.users) == (1, 1)
        draining = asyncio.create_task(segmenter.finish_accepted())
        await asyncio.sleep(0.05)
        assert not draining.done()
        gate.let()
        assert "result" in await read_end(exchange)
        assert await asyncio.wait_for(draining, 10)
        assert (segmenter.admission.requests, model.users) == (0, 0)


async def test_a_server_that_gives_up_says_so_in_the_last_line(open_gated: OpenGated) -> None:
    async with open_gated() as (app, gate):
        exchange = ask(app)
        await exchange.read_status()
        await read_progress(exchange, 0)
        giving_up = asyncio.create_task(app.state.segmenter.give_up())
        line = await read_end(exchange)
        assert (line["status"], line["error"]["code"]) == (503, "draining")
        gate.let()
        await giving_up


async def test_lines_that_cannot_be_sent_stop_the_work() -> None:
    cancelled = asyncio.Event()
    progress = RequestProgress()

    async def work() -> Segmented:
        progress.admit(1)
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()
        raise AssertionError

    closed: list[bool] = []
    stack = contextlib.ExitStack()
    stack.callback(closed.append, True)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            raise OSError("the connection is gone")

    response = ProgressResponse(work(), lambda segmented: b"", progress, "/segment")
    await response.admitted()
    response.closes(stack)
    with pytest.raises(OSError, match="gone"):
        await response({"type": "http"}, asyncio.Event().wait, send)  # type: ignore[arg-type]
    await asyncio.wait_for(cancelled.wait(), 10)
    assert closed == [True]


async def test_work_that_is_cancelled_before_admission_is_not_left_behind() -> None:
    began, cancelled = asyncio.Event(), asyncio.Event()

    async def work() -> Segmented:
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()
        raise AssertionError

    response = ProgressResponse(work(), lambda segmented: b"", RequestProgress(), "/segment")
    waiting = asyncio.create_task(response.admitted())
    await began.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.wait_for(cancelled.wait(), 10)


def read_chunks(url: httpx.URL, body: bytes) -> list[tuple[float, bytes]]:
    """The chunks of an answer as they are sent, with when each came, in seconds."""
    head = (
        f"POST /segment HTTP/1.1\r\nhost: {url.host}\r\naccept: application/x-ndjson\r\n"
        f"content-type: image/png\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((url.host, url.port or 80), timeout=30) as connection:
        connection.sendall(head.encode() + body)
        stream = connection.makefile("rb")
        assert stream.readline() == b"HTTP/1.1 200 OK\r\n"
        headers = dict(
            line.decode().strip().lower().split(": ", 1) for line in iter(stream.readline, b"\r\n")
        )
        assert headers["transfer-encoding"] == "chunked"
        assert "content-length" not in headers
        chunks = []
        while size := int(stream.readline(), 16):
            chunks.append((time.monotonic(), stream.read(size)))
            assert stream.readline() == b"\r\n"
        assert stream.readline() == b"\r\n"
        # The connection goes on.
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert stream.readline() == b"HTTP/1.1 200 OK\r\n"
        return chunks


def test_the_real_server_sends_each_line_when_it_is_due(tmp_path: Path) -> None:
    publish_graph(tmp_path / "repo", "blobs", build_slow_graph(rounds=20_000))
    flags = ("--model-repo", str(tmp_path / "repo"), *CPU_FLAGS)
    with run_server(tmp_path / "log", *flags) as server:
        chunks = read_chunks(httpx.URL(server.url), NINE)
        lines = [json.loads(chunk) for _, chunk in chunks]
        assert all(chunk.endswith(b"\n") for _, chunk in chunks)
        done = [line["progress"]["canvases_done"] for line in lines[:-1]]
        assert len(done) >= 2
        assert done == sorted(set(done))
        assert SegmentResponse.model_validate(lines[-1]["result"]).canvases == 9
        elapsed_s = lines[-2]["progress"]["elapsed_s"] - lines[0]["progress"]["elapsed_s"]
        # They came when they were written, not together at the end.
        assert chunks[-2][0] - chunks[0][0] == pytest.approx(elapsed_s, abs=0.25)
