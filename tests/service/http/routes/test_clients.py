"""Who is a client, and what the large images of one do to the requests of another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from service.http.app import create_app
from service.http.routes.state import find_client
from service.models.repository import load_repository
from service.settings import Settings
from tests.service.conftest import OPTIONS
from tests.support.blob_model import draw_picture, encode_picture
from tests.support.gate import EngineGate
from tests.support.waiting import wait_until

SMALL = encode_picture(draw_picture())
LARGE = encode_picture(draw_picture(256, 256))
"""An image of 25 canvases."""
AHEAD = 6
"""Calls until a small image is answered: one in flight, two prepared, one at equal service, its
own, and one that starts before the answer arrives."""

Connect = Callable[[str], httpx.AsyncClient]


@asynccontextmanager
async def run_gated(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> AsyncIterator[tuple[FastAPI, EngineGate, Connect]]:
    """A server whose engine waits for the test, and clients of it at any address."""
    changed = settings.model_copy(update=changes)
    repository = load_repository(changed.model_repo, OPTIONS)
    gate = EngineGate(monkeypatch, repository)
    app = create_app(changed, repository)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(app.router.lifespan_context(app))
        stack.callback(gate.let)

        def connect(address: str) -> httpx.AsyncClient:
            transport = httpx.ASGITransport(app, client=(address, 1))
            client = httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60)
            stack.push_async_callback(client.aclose)
            return client

        yield app, gate, connect


async def count_calls(gate: EngineGate, asked: asyncio.Task[httpx.Response]) -> int:
    """Lets one call after another through until a request is answered: how many."""
    before = gate.calls

    def is_past(calls: int) -> bool:
        return asked.done() or (gate.calls > calls and gate.is_waiting)

    while not asked.done():
        calls = gate.calls
        gate.let(1)
        await wait_until(partial(is_past, calls))
    assert (await asked).status_code == 200
    return gate.calls - before


async def test_large_images_of_one_client_never_refuse_another(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client sends as many large images as it can, and once more whenever one is answered."""
    bounds = {"max_queue_canvases": 128, "max_image_canvases": 32}
    async with run_gated(settings, monkeypatch, **bounds) as (app, gate, connect):
        admission = app.state.segmenter.admission
        greedy, modest = connect("10.0.0.1"), connect("10.0.0.2")
        small = await find_client(build_request("10.0.0.2"))
        statuses: list[int] = []

        async def flood() -> None:
            for _ in range(6):
                statuses.append((await greedy.post("/segment", content=LARGE)).status_code)

        async def ask_beside_others() -> None:
            asked = asyncio.create_task(modest.post("/segment", content=SMALL))
            await wait_until(lambda: asked.done() or admission.held(small) == 1)
            assert await count_calls(gate, asked) <= AHEAD

        flooding = [asyncio.create_task(flood()) for _ in range(4)]
        await wait_until(lambda: statuses.count(503) >= 6)
        assert admission.canvases == 50  # of a third image there would be 75, and 53 free
        for _ in range(20):
            await ask_beside_others()
        gate.let()
        await asyncio.gather(*flooding)
        assert statuses.count(200) >= 2
        assert (admission.canvases, admission.images, admission.requests) == (0, 0, 0)


async def test_a_small_request_does_not_wait_for_another_clients_large_image(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_gated(settings, monkeypatch) as (app, gate, connect):
        large = asyncio.create_task(connect("10.0.0.1").post("/segment", content=LARGE))
        await wait_until(lambda: app.state.segmenter.admission.canvases == 25)
        gate.let(15)
        await wait_until(lambda: gate.calls == 15)
        small = asyncio.create_task(connect("10.0.0.2").post("/segment", content=SMALL))
        await wait_until(lambda: app.state.segmenter.admission.canvases == 26)
        assert await count_calls(gate, small) <= AHEAD
        assert not large.done()
        gate.let()
        assert (await large).status_code == 200


async def test_a_client_alone_gets_half_of_the_queue(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_gated(settings, monkeypatch, max_queue_canvases=16) as (app, gate, connect):
        admission = app.state.segmenter.admission
        client = connect("10.0.0.1")
        posts = [asyncio.create_task(client.post("/segment", content=SMALL)) for _ in range(9)]
        (first,), _ = await asyncio.wait(posts, return_when=asyncio.FIRST_COMPLETED)
        refused = first.result()
        assert refused.status_code == 503
        assert "the client has 8 canvases in flight" in refused.json()["error"]["message"]
        assert (admission.canvases, admission.images) == (8, 8)
        others = [
            asyncio.create_task(connect(f"10.0.1.{i}").post("/segment", content=SMALL))
            for i in range(6)
        ]
        await wait_until(lambda: admission.canvases == 14)
        late = connect("10.0.2.1")
        for count, message in (
            (3, "14 of 16 canvases are in flight, there is no room for 3 more"),
            (2, "14 of 16 canvases are in flight, there is no room for 2 more"),
        ):
            refused = await late.post("/segment", files=[("images", SMALL)] * count)
            assert refused.status_code == 503
            assert message in refused.json()["error"]["message"]
        text = (await client.get("/metrics")).text
        assert 'solo_rejections_total{reason="client_share"} 1.0' in text
        assert 'solo_rejections_total{reason="queue_canvases"} 2.0' in text
        others.append(asyncio.create_task(late.post("/segment", content=SMALL)))
        await wait_until(lambda: admission.canvases == 15)
        gate.let()
        answers = await asyncio.gather(*posts, *others)
        assert [answer.status_code for answer in answers].count(200) == 15


async def test_a_refused_body_is_not_read(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When not even one canvas fits, the status comes before the body."""
    async with run_gated(settings, monkeypatch, max_queue_canvases=2) as (app, _, connect):
        client = connect("10.0.0.1")
        first = asyncio.create_task(client.post("/segment", content=SMALL))
        await wait_until(lambda: app.state.segmenter.admission.canvases == 1)

        async def body() -> AsyncIterator[bytes]:
            yield b"the first bytes"
            pytest.fail("the body is read")

        refused = await client.post("/segment", content=body())
        assert refused.status_code == 503
        assert not first.done()
        first.cancel()


@pytest.mark.parametrize(
    ("address", "other", "same"),
    [
        ("10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("2001:db8:0:1::5", "2001:db8:0:1:ffff::9", True),
        ("2001:db8:0:1::5", "2001:db8:0:2::5", False),
        ("", "", True),
        ("socket-a", "socket-b", False),
    ],
)
async def test_without_keys_a_client_is_an_address(address: str, other: str, same: bool) -> None:
    found = [(await find_client(build_request(peer))).name for peer in (address, other)]
    assert (found[0] == found[1]) is same


async def test_a_client_without_an_address_is_one_client() -> None:
    assert (await find_client(build_request(None))).name == ""


async def test_an_address_has_no_bounds_of_its_own() -> None:
    client = await find_client(build_request("10.0.0.1"))
    assert (client.weight, client.max_canvases, client.canvases_per_minute) == (1, None, None)


def build_request(address: str | None) -> Request:
    """A request of a peer to a server without keys."""
    app = FastAPI()
    app.state.keys = None
    peer = None if address is None else (address, 1)
    return Request({"type": "http", "headers": [], "client": peer, "app": app})
