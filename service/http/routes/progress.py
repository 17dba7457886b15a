"""Answers of Accept: application/x-ndjson: progress lines, then the result or the error."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack
from typing import Any

import orjson
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.errors import describe_error
from service.protocol import Segmented
from service.work.request import RequestProgress

logger = logging.getLogger(__name__)

EVERY_S = 0.5
"""Time between progress lines."""
HEARTBEAT_S = 5.0
"""Longest time without a line, also when there is no progress."""


class ProgressResponse(Response):
    """Streams the progress of a request while it is processed.

    `admitted` must be awaited before the response is returned: an error before admission is an
    ordinary answer with its own status.

    Args:
        work: Segments the request's images.
        build_body: The answer's JSON; raises the error of a single image that failed.
        progress: Updated by `work`.
        path: The request's.
    """

    def __init__(
        self,
        work: Coroutine[Any, Any, Segmented],
        build_body: Callable[[Segmented], bytes],
        progress: RequestProgress,
        path: str,
    ) -> None:
        # A proxy must not collect the lines.
        headers = {"vary": "accept", "cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(None, headers=headers, media_type="application/x-ndjson")
        del self.headers["content-length"]
        self._task = asyncio.ensure_future(work)
        self._build_body = build_body
        self._progress = progress
        self._stack = ExitStack()

    def closes(self, stack: ExitStack) -> None:
        """Hands over what is closed after the last line."""
        self._stack = stack

    async def admitted(self) -> None:
        """Waits for admission.

        Raises:
            Exception: The request was refused, or ended otherwise before it was admitted.
        """
        admission = asyncio.ensure_future(self._progress.admitted.wait())
        try:
            await asyncio.wait({self._task, admission}, return_when=asyncio.FIRST_COMPLETED)
            if self._task.done():  # a single image may have been refused by itself
                self._build_body(self._task.result())
        except asyncio.CancelledError:
            self._task.cancel()
            raise
        finally:
            admission.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the lines; the work is cancelled if they cannot be sent."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for line in self._lines():
                await send({"type": "http.response.body", "body": line, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._task.cancel()
            self._stack.close()

    async def _lines(self) -> AsyncIterator[bytes]:
        shown, shown_s = -1, 0.0
        while not self._task.done():
            now_s = time.monotonic()
            if self._progress.done != shown or now_s - shown_s >= HEARTBEAT_S:
                shown, shown_s = self._progress.done, now_s
                yield self._describe(now_s)
            await asyncio.wait({self._task}, timeout=EVERY_S)
        try:
            yield b'{"result":' + self._build_body(self._task.result()) + b"}\n"
        except ClientDisconnect:
            return
        except Exception as error:
            status, detail = describe_error(error)
            if detail["code"] == "internal_error":
                logger.error("a request failed", exc_info=error)
            yield orjson.dumps({"error": detail, "status": status}) + b"\n"

    def _describe(self, now_s: float) -> bytes:
        progress = self._progress
        fields = {
            "canvases_done": progress.done,
            "canvases": progress.canvases,
            "elapsed_s": round(now_s - progress.began_s, 3),
        }
        return orjson.dumps({"progress": fields}) + b"\n"
