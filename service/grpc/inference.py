"""ModelInfer and ModelStreamInfer: the request path of HTTP's `infer`, with gRPC's deadlines."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from service.errors import BodyTimeout
from service.grpc.calls import Rpc, recording
from service.grpc.messages import MESSAGES
from service.grpc.read import RpcCall, read_call
from service.grpc.status import shorten
from service.grpc.write import build_response
from service.http.oip.infer import build_options, find_failure
from service.http.routes.segment import MAX_FILES
from service.protocol import Segmented
from service.work.in_time import Stopped, describe_deadline, run_in_time
from service.work.request import ClientProfile, ImageFile, RequestProgress

STREAM_AHEAD = 16
"""Messages of a stream that are read before the first of them is answered."""
_LARGE_BYTES = 2**20


class RpcImageFailed(Exception):
    """An image made the whole request fail; its own error was counted.

    Attributes:
        status: As HTTP has it.
        detail: Code and text.
    """

    def __init__(self, status: int, detail: dict[str, str]) -> None:
        super().__init__(detail["message"])
        self.status = status
        self.detail = detail


async def infer(rpc: Rpc, client: ClientProfile, call: RpcCall, began_s: float) -> Any:
    """The answer of a parsed request.

    Args:
        rpc: Its RPC.
        client: Its sender.
        call: What it asks for.
        began_s: When it arrived.

    Raises:
        RpcImageFailed: An image failed.
        ServiceError: It is refused.
    """
    segmenter, settings = rpc.state.segmenter, rpc.state.settings
    options, images = build_options(call.call), [ImageFile(None, i) for i in call.call.images]
    timeout_ms = call.call.parameters.timeout_ms or settings.request_timeout_ms
    progress = RequestProgress(began_s=began_s)
    with segmenter.use(call.name, call.version, client) as model:
        cancelled = segmenter.metrics.cancelled_images
        work = segmenter.segment(model, images, options, client, progress)
        try:
            segmented: Segmented = await run_in_time(work, began_s + timeout_ms / 1e3)
        except Stopped as stopped:
            cancelled.labels(model.name, stopped.reason).inc(len(images))
            raise describe_deadline(timeout_ms, progress) from stopped
        except asyncio.CancelledError:
            reason = "deadline" if rpc.is_late else "client_left"
            cancelled.labels(model.name, reason).inc(len(images))
            raise
    failure = find_failure(call.call, segmented.outcomes)
    if failure is not None:
        raise RpcImageFailed(*failure)
    return build_response(segmented.model, call, segmented.outcomes)


async def parse_call(rpc: Rpc, message: bytes) -> RpcCall:
    """The call of a message, as `read_call` parses it; in a thread if the message is large."""
    max_images = min(MAX_FILES, rpc.state.segmenter.admission.max_canvases)
    if len(message) < _LARGE_BYTES:
        return read_call(message, max_images)
    return await asyncio.to_thread(read_call, message, max_images)


class InferStream:
    """ModelStreamInfer: several messages are in work, their answers come in their order.

    Args:
        rpc: Its RPC.
        client: Its sender.
    """

    def __init__(self, rpc: Rpc, client: ClientProfile) -> None:
        self._rpc = rpc
        self._client = client
        self._answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(STREAM_AHEAD)
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self) -> None:
        """Answers messages until the client has sent its last.

        Raises:
            BodyTimeout: It sends nothing, or takes no answers, for too long.
        """
        reader = self._start(self._read())
        try:
            while (task := await self._answers.get()) is not None:
                await self._write(await task)
                self._room.release()
            await reader
        finally:
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _read(self) -> None:
        limit_s = self._rpc.state.settings.body_total_s
        try:
            while True:
                await self._room.acquire()
                try:
                    async with asyncio.timeout(limit_s):
                        message = await self._rpc.read()
                except TimeoutError as error:
                    text = f"no message of the stream was complete in {limit_s:g} s"
                    raise BodyTimeout(text) from error
                if message is None:
                    return
                self._answers.put_nowait(self._start(self._answer(message, time.monotonic())))
        finally:
            self._answers.put_nowait(None)

    async def _answer(self, message: bytes, began_s: float) -> bytes:
        """The answer of one message; a failure is one too."""
        rpc, call = self._rpc, None
        response = MESSAGES["ModelStreamInferResponse"]()
        async with recording(rpc, began_s) as exchange:
            try:
                with rpc.hold(message):
                    call = await parse_call(rpc, message)
                    answer = await infer(rpc, self._client, call, began_s)
                    response.infer_response.CopyFrom(answer)
            except RpcImageFailed as failed:
                exchange.status = failed.status
                response.error_message = shorten(failed.detail["message"])
            except Exception as error:
                exchange.status, detail, _ = rpc.describe(error)
                response.error_message = shorten(detail["message"])
            if response.error_message and call is not None:
                response.infer_response.id = call.call.request_id or ""
        return bytes(response.SerializeToString())

    async def _write(self, answer: bytes) -> None:
        limit_s = self._rpc.state.settings.write_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await self._rpc.context.write(answer)
        except TimeoutError as error:
            text = f"the client has not taken an answer within {limit_s:g} s"
            raise BodyTimeout(text) from error
