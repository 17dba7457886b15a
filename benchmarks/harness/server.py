"""Servers as measured child processes, and the costs of a load on one."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.harness import BenchmarkError
from benchmarks.harness.process import ChildProcess
from benchmarks.harness.report import ROOT
from benchmarks.load import Load, run_at_rate, run_closed_loop
from tests.support.processes import free_port
from tests.support.ray_nodes import SETTINGS as RAY_SETTINGS

START_S = 120.0
ONE_BLAS_THREAD = {"OMP_NUM_THREADS": "1"}
"""NumPy's matrix products in post-processing would start threads in every worker process, which
wait for each other in busy loops. The engine's threads do not depend on it."""


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        url: Its address.
        process: It and its children.
    """

    url: str
    process: ChildProcess


@contextmanager
def serve(
    command: Sequence[str],
    is_ready: Callable[[str], bool],
    *,
    log: Path,
    folder: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    start_s: float = START_S,
    attempts: int = 1,
) -> Iterator[Server]:
    """A server, from its first answer on; ended afterwards.

    Args:
        command: Starts it; `{port}` is replaced by a free port.
        is_ready: Whether the server at an address answers; asked again and again.
        log: File for its output.
        folder: Working folder.
        environment: Variables beside this process's.
        start_s: How long it may take until it answers.
        attempts: Starts until it fails for good.

    Raises:
        BenchmarkError: It did not answer in time; with the end of its output.
    """
    for left in reversed(range(attempts)):
        port = str(free_port())
        url = f"http://127.0.0.1:{port}"
        words = [word.replace("{port}", port) for word in command]
        variables = {**ONE_BLAS_THREAD, **(environment or {}), "SERVING_PORT": port}
        with ChildProcess(words, folder=folder, environment=variables, log=log) as process:
            try:
                process.wait_until(lambda url=url: is_ready(url), start_s)  # type: ignore[misc]
            except BenchmarkError:
                if left:
                    continue
                raise
            yield Server(url, process)
            return


@contextmanager
def serve_ours(
    log: Path,
    *flags: str,
    root: Path = ROOT,
    on_ray: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """`python -m service` of a checkout with this interpreter; with `on_ray` on a Ray cluster."""
    root = root.resolve()
    words = [sys.executable, "-m", "service", *(["ray"] if on_ray else []), "--port", "{port}"]
    variables = {"PYTHONPATH": f"{root}", **(RAY_SETTINGS if on_ray else {}), **(environment or {})}
    with serve(
        [*words, *flags],
        is_service_ready,
        log=log,
        folder=root,
        environment=variables,
        start_s=400.0 if on_ray else START_S,
    ) as server:
        yield server


def is_service_ready(url: str) -> bool:
    """Whether our server has its models loaded."""
    try:
        return httpx.get(f"{url}/v2/health/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def measure_load(
    server: Server,
    bodies: Sequence[bytes],
    *,
    seconds: float = 0.0,
    clients: int | None = None,
    requests: int | None = None,
    per_second: float | None = None,
    paths: Sequence[str] = ("/segment",),
) -> dict[str, float]:
    """One load, and what it used of the machine.

    Args:
        server: The server to query.
        bodies: Images, in turn.
        seconds: How long requests are sent; each client sends one at least.
        clients: Of a closed loop, shared evenly by the paths.
        requests: Of a closed loop, in place of `seconds`.
        per_second: Mean rate of an open loop, in place of `clients`.
        paths: Asked at once.
    """
    began_s, client_began_s = time.monotonic(), time.process_time()

    async def run() -> list[Load]:
        if per_second is not None:
            rate = max(per_second, 1 / seconds)  # a server may have done nothing
            count = round(rate * seconds)
            (path,) = paths
            return [await run_at_rate(server.url, bodies, per_second=rate, count=count, path=path)]
        share = (clients or 1) // len(paths)

        def may_go_on(sent: int) -> bool:
            if requests is not None:
                return sent < requests
            return sent < share or time.monotonic() - began_s < seconds

        loops = [
            run_closed_loop(server.url, bodies, clients=share, may_go_on=may_go_on, path=path)
            for path in paths
        ]
        return await asyncio.gather(*loops)

    with server.process.measure() as usage:
        load = Load([answer for part in asyncio.run(run()) for answer in part.answers])
    took_s = time.monotonic() - began_s
    return {
        **summarise(load, took_s),
        "cpu_ms_per_image": 1e3 * usage.cpu_s / max(1, len(load.answers)),
        "server_cores": usage.cpu_s / took_s,
        "client_cores": (time.process_time() - client_began_s) / took_s,
        "peak_memory_mb": usage.peak_memory_bytes / 1e6,
    }


def summarise(load: Load, seconds: float) -> dict[str, Any]:
    """The numbers of one load.

    Args:
        load: All of it.
        seconds: From its beginning to the last answer: what is done within a shorter time would
            depend on where batches end, or count images that are still waiting.
    """
    row: dict[str, Any] = {"requests": len(load.answers)}
    row["errors"] = len(load.answers) - load.statuses[200]
    row["images_per_s"] = load.statuses[200] / seconds
    row |= {f"p{p}_ms": 1e3 * load.seconds_at(p, 200) for p in (50, 95, 99)}
    return row


def require_success(costs: Mapping[str, float], server: Server) -> None:
    """Makes sure that every request of a load was answered 200.

    Raises:
        BenchmarkError: One was not, or none was sent.
    """
    if costs["errors"] or not costs["requests"]:
        raise BenchmarkError(
            f"{server.url}: {costs['errors']:.0f} of {costs['requests']:.0f} requests failed"
        )
