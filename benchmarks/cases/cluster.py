"""Ray Serve: the cost of `solo-serve ray`, and the gain of a second worker.

Three servers run on this machine: one process with one engine thread, and on Ray with one worker
and with two, each with one thread. In turns each answers a closed loop of clients. Ratios are to
Ray with one worker. On two cores the clients, Ray's processes and the workers share them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

from benchmarks.harness.report import Report, Row
from benchmarks.harness.rounds import Samples, take_turns
from benchmarks.harness.server import Server, measure_load, require_success, serve_ours
from benchmarks.inputs import IMAGES, NUCLEI, read_images

ONE_THREAD = ("--device", "cpu", "--threads", "1", "--pool-threads", "1")
SINGLE, ONE, TWO = "single server", "Ray, 1 worker", "Ray, 2 workers"
SERVERS: dict[str, tuple[bool, tuple[str, ...]]] = {
    SINGLE: (False, ONE_THREAD),
    ONE: (True, (*ONE_THREAD, "--min-replicas", "1")),
    TWO: (True, (*ONE_THREAD, "--min-replicas", "2")),
}
"""By name: whether it runs on Ray, and its flags."""


def cluster(
    *,
    rounds: Annotated[int, "that count"] = 5,
    seconds: Annotated[float, "of each server in each round"] = 8,
    clients: Annotated[int, "in a closed loop"] = 8,
    model_repo: Annotated[Path, "folder of the models"] = NUCLEI.parent,
    images: Annotated[Path, "folder of the images"] = IMAGES,
) -> Report:
    bodies = read_images(images)

    def measure(server: Server) -> dict[str, float]:
        costs = measure_load(server, bodies, clients=clients, seconds=seconds)
        require_success(costs, server)
        return costs

    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        variants: dict[str, Callable[[], dict[str, float]]] = {}
        for name, (on_ray, flags) in SERVERS.items():
            log = Path(scratch) / f"{len(variants)}.log"
            server = stack.enter_context(
                serve_ours(log, "--model-repo", f"{model_repo}", *flags, on_ray=on_ray)
            )
            variants[name] = partial(measure, server)
        samples = take_turns(variants, rounds)
    rows = build_rows(samples)
    data = {"clients": clients, "rounds": samples.values, "rows": rows}
    return Report(data=data, tables={"": rows}, packages=("ray", "fastapi", "uvicorn"))


def build_rows(samples: Samples) -> list[Row]:
    """A row for each server."""
    return [
        {
            "": name,
            "images/s": samples.median(name, "images_per_s"),
            "p50, ms": samples.median(name, "p50_ms"),
            "p95, ms": samples.median(name, "p95_ms"),
            "CPU ms per image": samples.median(name, "cpu_ms_per_image"),
            "of 1 worker (range)": str(samples.ratio(name, ONE, "images_per_s")),
        }
        for name in samples.values
    ]
