"""Requests that are answered with progress lines, and how to read them."""

from __future__ import annotations

import json
from typing import Any

import httpx
from fastapi import FastAPI

from tests.support.asgi import AsgiExchange
from tests.support.blob_model import draw_picture, encode_picture

SMALL = encode_picture(draw_picture())
NINE = encode_picture(draw_picture(128, 128, {"red": (10, 10, 50, 60), "blue": (80, 70, 30, 40)}))
"""An image of nine canvases."""
ACCEPT = {"accept": "application/x-ndjson"}


def ask(app: FastAPI, body: bytes = NINE, path: str = "/segment", **given: Any) -> AsgiExchange:
    return AsgiExchange(app, path, body, {**ACCEPT, **given.pop("headers", {})}, **given)


async def read_line(exchange: AsgiExchange) -> dict[str, Any]:
    """The next line of an answer; each is sent at once and whole."""
    chunk = await exchange.read_chunk()
    assert chunk.endswith(b"\n") and chunk.count(b"\n") == 1
    line: dict[str, Any] = json.loads(chunk)
    return line


async def read_progress(exchange: AsgiExchange, done: int) -> dict[str, Any]:
    """Reads lines until that many canvases are done; none of them goes back."""
    before = -1
    while True:
        progress: dict[str, Any] = (await read_line(exchange))["progress"]
        assert before < progress["canvases_done"] <= done
        before = progress["canvases_done"]
        if before == done:
            return progress


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
