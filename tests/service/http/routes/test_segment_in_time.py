"""How a request ends early: its client leaves, its deadline passes, or it is cancelled."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fastapi import FastAPI, Request
from starlette.requests import ClientDisconnect
from starlette.types import Message

from service.errors import DeadlineExceeded
from service.http.routes.segment import segment_in_time
from service.observe.metrics import Metrics
from service.protocol import Segmented
from service.settings import Settings
from service.work.request import ClientProfile, ImageFile, RequestOptions, RequestProgress


class StuckSegmenter:
    """Its requests take for ever.

    Attributes:
        began: Set when one has begun.
    """

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.began = asyncio.Event()

    async def segment(self, *given: Any) -> Segmented:
        self.began.set()
        await asyncio.sleep(60)
        raise AssertionError

    def count(self, reason: str) -> float:
        """Images that were cancelled for a reason."""
        value: float = self.metrics.cancelled_images.labels("blobs", reason)._value.get()
        return value


class Connection:
    """What a request receives after its body: other messages, then that the client left."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self.task: asyncio.Task[Segmented] | None = None
        self.cancels = False

    async def receive(self) -> Message:
        message = await self.messages.get()
        if self.cancels and self.task is not None:
            self.task.cancel()
        return message

    def send(self, kind: str) -> None:
        self.messages.put_nowait({"type": kind})


async def start(
    connection: Connection, segmenter: StuckSegmenter, timeout_ms: int | None = 60_000
) -> asyncio.Task[Segmented]:
    app = FastAPI()
    app.state.settings = Settings(request_timeout_ms=60_000)
    state = {"began_s": time.monotonic()}
    scope = {"type": "http", "headers": [], "app": app, "state": state}
    progress = RequestProgress(canvases=9, done=2)
    work = segment_in_time(
        Request(scope, connection.receive),
        cast(Any, segmenter),
        SimpleNamespace(name="blobs"),
        [ImageFile(None, b"")] * 3,
        RequestOptions(),
        ClientProfile(),
        progress,
        timeout_ms,
    )
    connection.task = asyncio.create_task(work)
    await asyncio.wait_for(segmenter.began.wait(), 10)
    return connection.task


async def test_a_client_that_leaves_ends_its_request_and_nothing_else_does() -> None:
    connection, segmenter = Connection(), StuckSegmenter()
    task = await start(connection, segmenter)
    connection.send("http.request")
    await asyncio.sleep(0.02)
    assert not task.done()
    connection.send("http.disconnect")
    with pytest.raises(ClientDisconnect):
        await asyncio.wait_for(task, 10)
    assert (segmenter.count("client_left"), segmenter.count("deadline")) == (3, 0)
    assert task.cancelling() == 0


async def test_a_deadline_that_passes_says_how_far_the_request_was() -> None:
    segmenter = StuckSegmenter()
    began_s = time.monotonic()
    task = await start(Connection(), segmenter, timeout_ms=100)
    with pytest.raises(DeadlineExceeded, match="within 100 ms; 2 of 9 canvases were done"):
        await asyncio.wait_for(task, 10)
    assert time.monotonic() - began_s >= 0.1
    assert (segmenter.count("client_left"), segmenter.count("deadline")) == (0, 3)


async def test_a_request_that_is_cancelled_from_outside_is_cancelled() -> None:
    segmenter = StuckSegmenter()
    task = await start(Connection(), segmenter)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert (segmenter.count("client_left"), segmenter.count("deadline")) == (0, 0)


async def test_one_that_is_cancelled_while_its_client_leaves_is_cancelled_too() -> None:
    connection, segmenter = Connection(), StuckSegmenter()
    task = await start(connection, segmenter)
    connection.cancels = True
    connection.send("http.disconnect")
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def test_nothing_waits_for_a_request_that_has_ended() -> None:
    before = asyncio.all_tasks()
    connection, segmenter = Connection(), StuckSegmenter()
    task = await start(connection, segmenter, timeout_ms=50)
    with pytest.raises(DeadlineExceeded):
        await asyncio.wait_for(task, 10)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
