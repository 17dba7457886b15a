"""Cost of a server over its clients and its models; the load comes from the same machine."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.load import Load, read_metrics, run_closed_loop
from benchmarks.scaling_curve import Plan
from tests.support.server import run_server

CLIENTS = (1, 2, 4, 8, 16, 32, 64)
MODELS = (1, 2, 4, 8, 16)
MODEL_CLIENTS = 16
"""Shared evenly by the models."""
_CPU = "process_cpu_seconds_total"
_RESIDENT = "process_resident_memory_bytes"

Costs = dict[str, float]


def load_server(url: str, body: bytes, clients: int, seconds: float, paths: Sequence[str]) -> Costs:
    """A closed loop of clients, shared evenly by the paths.

    Raises:
        RuntimeError: A request was not answered 200.
    """

    share = clients // len(paths)

    async def run() -> list[Load]:
        end_s = time.monotonic() + seconds

        def may_go_on(sent: int) -> bool:  # every client asks at least once
            return sent < share or time.monotonic() < end_s

        loops = (
            run_closed_loop(url, [body], clients=share, may_go_on=may_go_on, path=path)
            for path in paths
        )
        return await asyncio.gather(*loops)

    before = read_metrics(url)
    began_s = time.monotonic()
    loads = asyncio.run(run())
    took_s = time.monotonic() - began_s
    after = read_metrics(url)
    load = Load([answer for part in loads for answer in part.answers])
    load.require_success(url)
    return {
        "images/s": len(load.answers) / took_s,
        "p50, ms": 1e3 * load.seconds_at(50, 200),
        "p95, ms": 1e3 * load.seconds_at(95, 200),
        "CPU ms a request": 1e3 * (after[_CPU] - before[_CPU]) / len(load.answers),
        "resident MB": after[_RESIDENT] / 1e6,
    }


def plan_clients(name: str, url: str, body: bytes, seconds: float) -> Plan:
    """A running server over the clients.

    Args:
        name: What it serves.
        url: Its address.
        body: The image that all clients send.
        seconds: Of each load.
    """

    def build(clients: int) -> Callable[[], Costs]:
        return lambda: load_server(url, body, clients, seconds, ["/segment"])

    return Plan(f"Clients, {name}", "clients", {count: build(count) for count in CLIENTS})


def copy_model(folder: Path, repository: Path, count: int) -> list[str]:
    """Copies of a model under names of their own."""
    names = []
    for index in range(count):
        copy = repository / f"{folder.name}-{index}"
        shutil.copytree(folder, copy)
        config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
        config["name"] = copy.name
        (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
        names.append(copy.name)
    return names


def plan_models(folder: Path, scratch: Path, body: bytes, seconds: float) -> Plan:
    """A new server each time, with copies of the model in `folder`.

    Args:
        folder: The model's.
        scratch: For the repositories.
        body: The image that all clients send.
        seconds: Of each load.
    """

    def build(count: int) -> Callable[[], Costs]:
        repository = scratch / f"models-{count}"
        names = copy_model(folder, repository, count)
        paths = [f"/segment?model={name}" for name in names]

        def run() -> Costs:
            began_s = time.monotonic()
            flags = "--model-repo", f"{repository}", "--device", "cpu"
            with run_server(scratch / f"models-{count}.log", *flags) as server:
                start_s = time.monotonic() - began_s
                costs = load_server(server.url, body, MODEL_CLIENTS, seconds, paths)
            return {"start, s": start_s, **costs}

        return run

    title = f"Models (copies of the bundled one, {MODEL_CLIENTS} clients)"
    return Plan(title, "models", {count: build(count) for count in MODELS})
