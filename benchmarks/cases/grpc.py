"""gRPC beside HTTP: one server, the same images, Triton's clients for both.

    python -m benchmarks grpc

The ways are `POST /segment` by aiohttp, and `infer` by tritonclient.http.aio, tritonclient.grpc.aio
and the latter's stream. They take turns; each is a closed loop of clients in one event loop, whose
use of the cores is reported, as it shares them with the server. Needs the extras `grpc` and `test`.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tritonclient.grpc.aio as over_grpc
import tritonclient.http.aio as over_http

from benchmarks.harness import BenchmarkError
from benchmarks.harness.report import Report, Row
from benchmarks.harness.rounds import take_turns
from benchmarks.harness.server import Server, serve_ours
from benchmarks.inputs import Workload, build_workload
from benchmarks.load import ask, open_client
from tests.support.processes import free_port

Ask = Callable[[bytes], Awaitable[object]]
"""Sends an image and waits for its answer; raises if there is none."""
Way = Callable[[str, str], AbstractAsyncContextManager[Ask]]
"""Opens a client of a server's address, for a model."""
SHOWN = ("images_per_s", "p50_ms", "p99_ms", "cpu_ms_per_image", "client_cores")


def grpc(
    *,
    workload: Annotated[Literal["light", "nuclei"], "what is served"] = "light",
    clients: Annotated[tuple[int, ...], "of the closed loops"] = (1, 16, 64),
    rounds: Annotated[int, "that count"] = 5,
    seconds: Annotated[float, "of each loop"] = 4.0,
    workers: Annotated[int, "worker processes"] = 1,
) -> Report:
    rows: list[Row] = []
    data: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        served, port = build_workload(workload, folder), free_port()
        flags = ("--model-repo", str(served.model.parent), "--device", "cpu")
        listening = ("--grpc-port", str(port), "--workers", str(workers))
        with serve_ours(folder / "log", *flags, *listening) as server:
            for count in clients:
                samples = measure_ways(server, port, served, count, rounds, seconds)
                data[str(count)] = samples.values
                rows += [
                    {"clients": count, "way": way}
                    | {name: samples.median(way, name) for name in SHOWN}
                    for way in WAYS
                ]
    return Report(data=data, tables={"": rows}, packages=("grpcio", "tritonclient", "aiohttp"))


def measure_ways(
    server: Server, port: int, served: Workload, clients: int, rounds: int, seconds: float
) -> Any:
    """All ways in turns, with a number of clients."""
    bodies = list(served.images.values())
    addresses = {"grpc": f"127.0.0.1:{port}", "http": server.url}

    def measure(name: str) -> dict[str, float]:
        way = WAYS[name](addresses[name.split()[0]], served.model.name)
        began_s, client_began_s = time.monotonic(), time.process_time()
        with server.process.measure() as usage:
            times = asyncio.run(run_loop(way, bodies, clients, seconds))
        took_s = time.monotonic() - began_s
        return {
            "images_per_s": len(times) / took_s,
            "p50_ms": 1e3 * float(np.percentile(times, 50)),
            "p99_ms": 1e3 * float(np.percentile(times, 99)),
            "cpu_ms_per_image": 1e3 * usage.cpu_s / len(times),
            "client_cores": (time.process_time() - client_began_s) / took_s,
        }

    variants = {name: lambda name=name: measure(name) for name in WAYS}
    return take_turns(variants, rounds, tell=lambda text: print(text, file=sys.stderr))


async def run_loop(
    way: AbstractAsyncContextManager[Ask], bodies: Sequence[bytes], clients: int, seconds: float
) -> list[float]:
    """The time of each image, seconds; every client sends one at least."""
    times: list[float] = []
    end_s = time.monotonic() + seconds

    async def run_client(send: Ask, first: int) -> None:
        for turn in itertools.count(first):
            began_s = time.monotonic()
            await send(bodies[turn % len(bodies)])
            times.append(time.monotonic() - began_s)
            if time.monotonic() >= end_s:
                return

    async with way as send:
        await asyncio.gather(*(run_client(send, index) for index in range(clients)))
    return times


@asynccontextmanager
async def open_segment(address: str, model: str) -> AsyncIterator[Ask]:
    """POST /segment."""
    async with open_client(address) as client:

        async def send(body: bytes) -> None:
            answer = await ask(client, f"/segment?model={model}", body)
            if answer.status != 200:
                raise BenchmarkError(f"{address} answered {answer.status} {answer.error}")

        yield send


def build_input(module: Any, body: bytes) -> Any:
    """An image as tritonclient's input."""
    tensor = module.InferInput("image", [1], "BYTES")
    return tensor.set_data_from_numpy(np.array([body], np.object_))


@asynccontextmanager
async def open_http(address: str, model: str) -> AsyncIterator[Ask]:
    """The protocol over HTTP."""
    url = address.removeprefix("http://")
    async with over_http.InferenceServerClient(url, conn_limit=1000) as client:
        yield lambda body: client.infer(model, [build_input(over_http, body)])


@asynccontextmanager
async def open_unary(address: str, model: str) -> AsyncIterator[Ask]:
    """The protocol over gRPC, a call for each image."""
    async with over_grpc.InferenceServerClient(address) as client:
        yield lambda body: client.infer(model, [build_input(over_grpc, body)])


@asynccontextmanager
async def open_stream(address: str, model: str) -> AsyncIterator[Ask]:
    """The protocol over gRPC, all images in one stream; its answers come in their order."""
    waiting: asyncio.Queue[asyncio.Future[None]] = asyncio.Queue()
    sent: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def send_all() -> AsyncIterator[dict[str, Any]]:
        while (body := await sent.get()) is not None:
            yield {"model_name": model, "inputs": [build_input(over_grpc, body)]}

    async def read_all(answers: Any) -> None:
        async for _, error in answers:
            turn = await waiting.get()
            if error is None:
                turn.set_result(None)
            else:
                turn.set_exception(error)

    async def send(body: bytes) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting.put_nowait(turn)
        sent.put_nowait(body)
        await turn

    async with over_grpc.InferenceServerClient(address) as client:
        reading = asyncio.create_task(read_all(client.stream_infer(send_all())))
        yield send
        sent.put_nowait(None)
        await reading


WAYS: dict[str, Way] = {
    "http /segment": open_segment,
    "http infer": open_http,
    "grpc infer": open_unary,
    "grpc stream": open_stream,
}
