"""Accept: application/x-ndjson: progress lines while a request is processed, then the result."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import time
from pathlib import Path

import httpx
import pytest

from service.http.routes import progress as progress_module
from service.http.schemas import SegmentResponse
from tests.service.http.routes.conftest import OpenGated
from tests.support.progress_lines import (
    ACCEPT,
    NINE,
    SMALL,
    ask,
    lines_of,
    read_end,
    read_line,
    read_progress,
)
from tests.support.server import CPU_FLAGS, run_server
from tests.support.slow_model import build_slow_graph, publish_graph

pytestmark = pytest.mark.usefixtures("quick_progress")

INTERVALS_S = (progress_module.EVERY_S, progress_module.HEARTBEAT_S)


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
            assert line["canvases"] == 9
            elapsed_s.append(line["elapsed_s"])
            gate.let(1)
        assert elapsed_s == [round(value, 3) for value in elapsed_s]
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
        assert (await read_progress(exchange, 0))["canvases"] == 10
        gate.let(9)
        assert (await read_progress(exchange, 9))["canvases"] == 10
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


def test_progress_is_looked_at_every_half_second_and_a_line_comes_every_5_s() -> None:
    assert INTERVALS_S == (0.5, 5)


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
