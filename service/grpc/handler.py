"""What is called for each RPC; and what every RPC has in common."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc

from service.errors import BodyTooLarge, NotOffered
from service.grpc import describe, health
from service.grpc.calls import Rpc, RpcState, recording
from service.grpc.inference import InferStream, RpcImageFailed, infer, parse_call
from service.grpc.places import Places
from service.http.routes.triton import LOGGING, SHARED_MEMORY, TRACES

MAX_SMALL_BYTES = 64 * 1024
"""Of a message that is not for segmentation."""
Answer = Callable[[Rpc, bytes], Awaitable[Any]]
_CHECK, _WATCH = (f"/{health.SERVICE}/{name}" for name in ("Check", "Watch"))
_UNARY: dict[str, Answer] = {
    f"/{health.INFERENCE}/{name}": answer
    for name, answer in {
        "ServerLive": describe.show_live,
        "ServerReady": describe.show_ready,
        "ModelReady": describe.show_model_ready,
        "ServerMetadata": describe.show_server,
        "ModelMetadata": describe.show_model,
        "ModelConfig": describe.show_config,
        "ModelStatistics": describe.show_statistics,
        "RepositoryIndex": describe.show_index,
        "RepositoryModelLoad": describe.load,
        "RepositoryModelUnload": describe.unload,
    }.items()
} | {_CHECK: health.check}
_NOT_OFFERED = {
    f"/{health.INFERENCE}/{name}": reason
    for name, reason in {
        "TraceSetting": TRACES,
        "LogSettings": LOGGING,
        **{
            f"{kind}SharedMemory{act}": SHARED_MEMORY
            for kind in ("System", "Cuda")
            for act in ("Status", "Register", "Unregister")
        },
    }.items()
}
_INFER, _STREAM = (f"/{health.INFERENCE}/Model{kind}" for kind in ("Infer", "StreamInfer"))


class RpcHandler(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Answers every RPC; messages are read here, when there is a place for them.

    Args:
        state: What RPCs share.
    """

    def __init__(self, state: RpcState) -> None:
        self._state = state

    def service(self, call: Any) -> Any:
        """The handler of an RPC; None if there is no such method.

        All take a stream of messages, also those of which clients send one: it is not read before
        there is a place for it.
        """
        path = call.method
        if path == _STREAM:
            return grpc.stream_stream_rpc_method_handler(self._stream)
        if path == _WATCH:
            return grpc.stream_stream_rpc_method_handler(self._watch)
        answer = self._infer if path == _INFER else _UNARY.get(path)
        if path in _NOT_OFFERED:

            async def answer(rpc: Rpc, message: bytes) -> Any:
                raise NotOffered(_NOT_OFFERED[path])

        if answer is None:
            return None

        async def run(messages: Any, context: Any) -> bytes:
            return await self._answer(path, answer, context)

        return grpc.stream_unary_rpc_method_handler(run)

    async def _answer(self, path: str, answer: Answer, context: Any) -> bytes:
        """Answers an RPC with one message."""
        state = self._state
        is_health = path == _CHECK
        places = state.health if is_health else state.calls
        readers = state.health_readers if is_health else state.readers
        async with self._opened(path, places, context) as rpc:
            if path == _INFER:
                rpc.client = await rpc.find_client()
            message = await rpc.read_only(readers)
            if path != _INFER and len(message) > MAX_SMALL_BYTES:
                raise BodyTooLarge(
                    f"the message has {len(message)} bytes, the limit is {MAX_SMALL_BYTES}"
                )
            with rpc.hold(message):
                return bytes((await answer(rpc, message)).SerializeToString())
        raise AssertionError  # `_opened` has raised

    @staticmethod
    async def _infer(rpc: Rpc, message: bytes) -> Any:
        call = await parse_call(rpc, message)
        return await infer(rpc, rpc.client, call, rpc.began_s)

    async def _stream(self, messages: Any, context: Any) -> None:
        """ModelStreamInfer; each of its messages is recorded as a request."""
        async with self._opened(_STREAM, self._state.streams, context, of_messages=True) as rpc:
            await InferStream(rpc, await rpc.find_client()).run()

    async def _watch(self, messages: Any, context: Any) -> None:
        async with self._opened(_WATCH, self._state.health, context) as rpc:
            message = await rpc.read_only(self._state.health_readers)
            async for response in health.watch(rpc, message):
                await context.write(response.SerializeToString())

    @asynccontextmanager
    async def _opened(
        self, path: str, places: Places, context: Any, *, of_messages: bool = False
    ) -> AsyncIterator[Rpc]:
        """An RPC from its begin to its end, which a failure brings too.

        Args:
            path: Its method.
            places: Where it takes a place.
            context: grpc's.
            of_messages: It is recorded only if it fails.
        """
        rpc = Rpc(self._state, path, context)
        failure: tuple[int, dict[str, str], int | None] | None = None
        async with recording(rpc, rpc.began_s, only_failures=of_messages) as exchange:
            try:
                with places.take(rpc.address_name):
                    yield rpc
            except RpcImageFailed as failed:
                failure = failed.status, failed.detail, None
            except Exception as error:
                failure = rpc.describe(error)
            if failure is not None:
                exchange.status = failure[0]
        if failure is not None:
            await rpc.abort(*failure)
