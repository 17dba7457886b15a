"""One RPC: who sends it, what it may hold, its messages, its errors, and what is written of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from urllib.parse import unquote

from grpc import aio
from starlette.datastructures import State

from service.errors import (
    BodyTimeout,
    InvalidRequest,
    Overloaded,
    ServiceError,
    describe_error,
    drop_frames,
)
from service.grpc.places import Places
from service.grpc.status import find_status, shorten
from service.http.clients import client_at, find_origin, find_spec
from service.http.exchange import CLIENT_LEFT, REQUEST_ID
from service.http.keys import KeySpec
from service.http.limits import BODY_BYTES, RequestBodies
from service.http.middleware import choose_id
from service.http.refusals import count_refusal
from service.observe.metrics import Metrics
from service.observe.requests import AnsweredRequest, record
from service.observe.tracing import collect_images
from service.protocol import Segmenter
from service.settings import Settings
from service.work.request import ClientProfile

logger = logging.getLogger(__name__)

ERROR_CODE = "solo-error-code"
"""Trailing metadata with the code that HTTP has in its answer."""
MAX_ARRIVING = 32
"""Messages that may be incomplete at once, of streams and of other RPCs each."""
_ARRIVING_PER_BODY = 4
"""For each body of the largest size for which there is memory. grpc does not say how much of a
message has arrived, and most are small."""
MAX_HEALTH_CALLS = 100
MAX_HEALTH_READERS = 8
"""Health checks whose message may be incomplete at once: no other RPC can hold them up."""
_METHOD = "POST"  # gRPC is HTTP/2


class RpcState:
    """What the RPCs of a server share.

    Args:
        application: State of the HTTP application.

    Attributes:
        calls: Places of RPCs but those of `streams` and `health`.
        streams: Places of streams.
        health: Places of health checks.
        readers: Places of RPCs whose message is arriving, but those of `health_readers`.
    """

    def __init__(self, application: State) -> None:
        self.settings: Settings = application.settings
        self.segmenter: Segmenter = application.segmenter
        self.metrics: Metrics = application.metrics
        self.bodies: RequestBodies = application.bodies
        self.version: str = application.version
        self._application = application
        self.calls = Places(self.settings.max_connections)
        bodies = self.settings.max_bodies_bytes // self.settings.max_body_bytes
        arriving = min(MAX_ARRIVING, _ARRIVING_PER_BODY * bodies)
        self.streams, self.readers = Places(arriving), Places(arriving)
        self.health, self.health_readers = Places(MAX_HEALTH_CALLS), Places(MAX_HEALTH_READERS)

    @property
    def keys(self) -> Any:
        """The server's keys, or None."""
        return self._application.keys

    @property
    def tracer(self) -> Any:
        """The server's tracer, or None."""
        return self._application.tracer


class HeldMessage:
    """A message that has arrived, counted in the bytes of all bodies; a `BodySource`.

    Attributes:
        arriving_bytes: Its size.
        refusal: Why there is no memory for it.
    """

    def __init__(self, size: int) -> None:
        self.arriving_bytes = size
        self.refusal: ServiceError | None = None

    def refuse_body(self, error: ServiceError) -> None:
        """Called by `RequestBodies.add`."""
        self.refusal = Overloaded(str(error), BODY_BYTES)


class Rpc:
    """An RPC that has begun.

    Args:
        state: Of the server.
        path: Its method.
        context: grpc's.
    """

    def __init__(self, state: RpcState, path: str, context: Any) -> None:
        self.state = state
        self.path = path
        self.context = context
        self.headers = {
            key: value
            for key, value in reversed(context.invocation_metadata() or ())
            if isinstance(value, str)
        }
        forwarded = self.headers.get("x-forwarded-for", "")
        peer = read_address(context.peer())
        self.address = find_origin(peer, forwarded, state.settings.trusted_proxies)
        self.request_id = choose_id(self.headers.get(REQUEST_ID, ""))
        self.began_s = time.monotonic()
        self.client = ClientProfile()

    async def find_key(self) -> KeySpec | None:
        """The API key of its metadata, None if the server needs none; refused as over HTTP."""
        return await find_spec(self.state.keys, self.headers, self.address)

    async def find_client(self) -> ClientProfile:
        """The holder of its API key, or else its peer address."""
        spec = await self.find_key()
        return client_at(self.address) if spec is None else spec.client

    @property
    def is_late(self) -> bool:
        """Whether the deadline of the RPC has passed."""
        remaining_s = self.context.time_remaining()
        return remaining_s is not None and remaining_s <= 0

    @property
    def address_name(self) -> str:
        """What `Places` knows the client by."""
        return client_at(self.address).name

    async def read(self) -> bytes | None:
        """The next message; None after the last one."""
        message = await self.context.read()
        return None if message is aio.EOF else message

    async def read_only(self, readers: Places) -> bytes:
        """The message of an RPC that has one.

        Args:
            readers: Where its place is while it arrives.

        Raises:
            BodyTimeout: It was not complete in time.
            InvalidRequest: There is none.
        """
        limit_s = self.state.settings.body_timeout_s
        async with readers.wait(self.address_name):
            try:
                async with asyncio.timeout(limit_s):
                    message = await self.read()
            except TimeoutError as error:
                text = f"the message was not complete after {limit_s:g} s"
                raise BodyTimeout(text) from error
        if message is None:
            raise InvalidRequest("the call ended without a message")
        return message

    @contextmanager
    def hold(self, message: bytes) -> Iterator[None]:
        """Counts the bytes of a message until the context ends.

        Raises:
            Overloaded: There is no memory for it.
        """
        held, bodies = HeldMessage(len(message)), self.state.bodies
        bodies.add(held, len(message))
        bodies.complete(held)
        try:
            if held.refusal is not None:
                raise held.refusal
            yield
        finally:
            bodies.release(len(message))

    def describe(self, error: Exception) -> tuple[int, dict[str, str], int | None]:
        """Counts and logs an error: HTTP status, code and text, and seconds until a retry."""
        status, detail = describe_error(error)
        if detail["code"] == "internal_error":
            extra = {"request_id": self.request_id}
            logger.error("request %s failed", self.request_id, exc_info=error, extra=extra)
        drop_frames(error)
        settings = self.state.settings
        return status, detail, count_refusal(error, self.state.metrics, settings.retry_after_s)

    async def abort(self, status: int, detail: dict[str, str], retry_after_s: int | None) -> None:
        """Ends the RPC with an error; always raises."""
        metadata = [(REQUEST_ID, self.request_id), (ERROR_CODE, detail["code"])]
        if retry_after_s is not None:
            metadata.append(("retry-after", str(retry_after_s)))
        code = find_status(status, detail["code"])
        await self.context.abort(code, shorten(detail["message"]), tuple(metadata))


class Exchange:
    """One request and its answer: an RPC, or a message of a stream.

    Attributes:
        status: The answer's, as HTTP has it.
    """

    def __init__(self) -> None:
        self.status = 200


@asynccontextmanager
async def recording(
    rpc: Rpc, began_s: float, *, only_failures: bool = False
) -> AsyncIterator[Exchange]:
    """Counts, logs and traces what happens in the context as one request.

    Args:
        rpc: Its RPC.
        began_s: When it arrived.
        only_failures: Nothing is written of a success.
    """
    state, exchange = rpc.state, Exchange()
    images = collect_images() if state.tracer is not None else []
    try:
        yield exchange
    except asyncio.CancelledError:
        exchange.status = 504 if rpc.is_late else CLIENT_LEFT
        raise
    finally:
        if exchange.status != 200 or not only_failures:
            request = AnsweredRequest(
                route=rpc.path,
                method=_METHOD,
                path=rpc.path,
                request_id=rpc.request_id,
                status=exchange.status,
                ran=(began_s, time.monotonic()),
                headers=rpc.headers,
                attributes={"rpc.system": "grpc"},
                images=images,
            )
            record(request, state.metrics, state.tracer, logger)


def read_address(peer: str) -> str:
    """The address of a peer, as grpc names it: `ipv4:127.0.0.1:80`, `ipv6:%5B::1%5D:80`."""
    kind, _, rest = unquote(peer).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return peer
    return rest.rpartition(":")[0].strip("[]")
