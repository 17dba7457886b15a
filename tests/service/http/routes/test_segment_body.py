"""What an answer of POST /segment says of its images together, and what is left of a request."""

from __future__ import annotations

import asyncio

import httpx
import orjson
import pytest
from fastapi import FastAPI

from pipeline.errors import CorruptImage
from service.engines.state import EngineState
from service.http.routes.segment import build_body
from service.observe.timing import Timing
from service.protocol import ModelState, Segmented
from service.work.request import Outcome
from tests.support.asgi import AsgiExchange
from tests.support.blob_model import draw_picture, encode_picture
from tests.support.canvases import CONFIG

PICTURE = encode_picture(draw_picture())
STATE = ModelState(CONFIG, EngineState("fake", "cpu", "fp32", "a test"), 1)
SHORT = Timing(decode=1e-3, queue=0, infer=0, postprocess=0, encode=0, total=1e-3)
LONG = Timing(decode=2.0004e-3, queue=0.1, infer=0.2, postprocess=0, encode=0, total=0.3020004)
GOOD = [
    Outcome(b'{"n":0}', LONG, canvases=2, engine_s=1.23456e-3),
    Outcome(b'{"n":1}', SHORT, canvases=3, engine_s=2e-3),
]
BAD = Outcome(b'{"error":1}', error=CorruptImage("broken"))


def test_an_answer_has_the_sum_of_the_costs_and_the_times_of_the_slowest_image() -> None:
    for outcomes in (GOOD, GOOD[::-1], [BAD, *GOOD]):
        body = orjson.loads(build_body(Segmented(STATE, outcomes)))
        assert body["canvases"] == 5
        assert body["cost"] == {"canvases": 5, "engine_ms": 3.235}
        assert body["timing_ms"] == {
            "decode": 2.0,
            "queue": 100.0,
            "infer": 200.0,
            "postprocess": 0.0,
            "encode": 0.0,
            "total": 302.0,
        }
        assert body["results"] == [orjson.loads(outcome.payload) for outcome in outcomes]


def test_images_that_all_failed_took_no_time_and_cost_nothing() -> None:
    body = orjson.loads(build_body(Segmented(STATE, [BAD, BAD])))
    assert body["cost"] == {"canvases": 0, "engine_ms": 0.0}
    assert set(body["timing_ms"].values()) == {0.0}


def test_the_error_of_a_single_image_is_the_requests() -> None:
    with pytest.raises(CorruptImage, match="broken"):
        build_body(Segmented(STATE, [BAD]))


async def test_nothing_of_a_request_that_was_answered_is_left(app: FastAPI) -> None:
    async with app.router.lifespan_context(app):
        before = asyncio.all_tasks()
        exchange = AsgiExchange(app, "/segment", PICTURE)
        assert (await exchange.read_status())[0] == 200
        await exchange.end()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() <= before


async def test_a_deadline_that_was_kept_stops_nothing_later(client: httpx.AsyncClient) -> None:
    """The client calls the application in its own task, which goes on."""
    response = await client.post("/segment?timeout_ms=1500", content=PICTURE)
    assert response.status_code == 200
    await asyncio.sleep(1.6)


def test_the_schema_says_that_a_body_is_needed(app: FastAPI) -> None:
    body = app.openapi()["paths"]["/segment"]["post"]["requestBody"]
    assert body["required"] is True
    assert {"multipart/form-data", "image/jpeg", "image/png"} <= set(body["content"])
