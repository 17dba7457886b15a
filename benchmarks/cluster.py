"""What `solo-serve ray` costs, and what a second worker is worth.

python -m benchmarks.cluster --out benchmarks/results/cluster.json

Three servers run on this machine: the single one with one thread, and on Ray with one worker and
with two, each worker with one thread. In turns each answers a closed loop of clients that send the
images of the bundled model. The ratios are to Ray with one worker, round by round. On two cores
clients, Ray's processes and two workers share them: on more machines there is more to be gained.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load import run_closed_loop
from benchmarks.report import (
    describe_machine,
    markdown_table,
    ratio_quartiles,
    show_quartiles,
    this_command,
    write_report,
)
from tests.support.server import ROOT, run_server

PACKAGES = ("ray", "fastapi", "uvicorn")
ONE_THREAD = ("--device", "cpu", "--threads", "1", "--pool-threads", "1")
SINGLE, ONE, TWO = "single server", "Ray, 1 worker", "Ray, 2 workers"
SERVERS: dict[str, tuple[bool, tuple[str, ...]]] = {
    SINGLE: (False, ONE_THREAD),
    ONE: (True, (*ONE_THREAD, "--min-replicas", "1")),
    TWO: (True, (*ONE_THREAD, "--min-replicas", "2")),
}
"""By name: whether it is on Ray, and its flags."""


def measure(url: str, bodies: list[bytes], clients: int, seconds: float) -> dict[str, float]:
    """One closed loop.

    Raises:
        RuntimeError: A request was not answered 200.
    """
    began_s = time.monotonic()
    load = asyncio.run(
        run_closed_loop(
            url,
            bodies,
            clients=clients,
            may_go_on=lambda _: time.monotonic() - began_s < seconds,
        )
    )
    load.require_success(url)
    return {
        "images_per_s": len(load.answers) / (time.monotonic() - began_s),
        "p50_ms": 1e3 * load.seconds_at(50, 200),
        "p95_ms": 1e3 * load.seconds_at(95, 200),
    }


def summarise(rounds: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Rows of the table: medians, and the throughput's ratio to one worker's."""
    rates = {name: [row["images_per_s"] for row in rows] for name, rows in rounds.items()}
    table = []
    for name, rows in rounds.items():
        ratio = ratio_quartiles(rates[name], rates[ONE])
        table.append(
            {
                "": name,
                "images/s": float(np.median(rates[name])),
                "p50, ms": float(np.median([row["p50_ms"] for row in rows])),
                "p95, ms": float(np.median([row["p95_ms"] for row in rows])),
                "of 1 worker, quartiles": show_quartiles(ratio),
            }
        )
    return table


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cluster",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8, help="of each server in each round")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--model-repo", type=Path, default=ROOT / "model_repo")
    parser.add_argument(
        "--images", type=Path, default=ROOT / "tests" / "data" / "nuclei" / "images"
    )
    parser.add_argument("--out", type=Path, help="write the numbers, with the command")
    return parser


def main() -> None:
    options = build_parser().parse_args()
    bodies = [path.read_bytes() for path in sorted(options.images.iterdir())]
    repo = ("--model-repo", str(options.model_repo))
    rounds: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        urls = {}
        for index, (name, (on_ray, flags)) in enumerate(SERVERS.items()):
            log = Path(scratch) / f"{index}.log"
            server = stack.enter_context(run_server(log, *repo, *flags, on_ray=on_ray))
            urls[name] = server.url
        for number in range(options.rounds + 1):
            for name, url in urls.items():
                row = measure(url, bodies, options.clients, options.seconds)
                if number:  # the first round warms up
                    rounds[name].append(row)
    rows = summarise(rounds)
    print(markdown_table(rows))
    if options.out is not None:
        payload = {
            "machine": describe_machine(PACKAGES),
            "clients": options.clients,
            "rounds": rounds,
            "rows": rows,
        }
        write_report(options.out, this_command("benchmarks.cluster"), payload)


if __name__ == "__main__":
    main()
