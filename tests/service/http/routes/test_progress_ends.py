"""Accept: application/x-ndjson: refusals, errors in the last line, clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.http.keys import add_key
from service.http.routes.progress import ProgressResponse
from service.protocol import Segmented
from service.settings import Settings
from service.work.request import ClientProfile, RequestProgress
from tests.service.http.routes.conftest import OpenGated
from tests.support.blob_model import encode_picture, poisoned_picture
from tests.support.pictures import build_png_header, build_truncated_jpeg
from tests.support.progress_lines import (
    ACCEPT,
    SMALL,
    ask,
    lines_of,
    read_end,
    read_progress,
)

pytestmark = pytest.mark.usefixtures("quick_progress")


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

    before = asyncio.all_tasks()
    response = ProgressResponse(work(), lambda segmented: b"", progress, "/segment")
    await response.admitted()
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks() - before) == 1  # the work; nobody waits for admission any more
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
