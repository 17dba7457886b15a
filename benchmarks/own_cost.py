"""What the server's own layer costs: CPU time of a request, beside the bare loop's.

python -m benchmarks.own_cost --tree before=../before --tree after=. --out own_cost.json

Each tree is a checkout of this project whose server is started once; without --tree it is this one
alone. In turns each server answers a closed loop of clients, and the bare loop (benchmarks.bare)
runs for as many images. CPU time is that of the server's process alone, read from its /metrics:
other people's load disturbs it less than wall time. The ratios are to the first tree, round by
round. The default model is a tiny one, so that nearly all that is measured is the layer.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bare import run_bare_loop
from benchmarks.load import read_metrics, run_closed_loop
from benchmarks.report import (
    describe_machine,
    markdown_table,
    ratio_quartiles,
    show_quartiles,
    this_command,
    write_report,
)
from service.engines.base import BackendOptions
from service.models.repository import LoadedModel, load_version
from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.server import run_server
from tests.support.slow_model import ONE_CANVAS

BARE = "bare loop"
PACKAGES = ("fastapi", "starlette", "uvicorn", "uvloop", "httptools")
_CPU = "process_cpu_seconds_total"


@contextmanager
def run_tree(tree: Path, log: Path, *flags: str) -> Iterator[str]:
    """The server of a checkout; its address."""
    root = tree.resolve()
    with run_server(log, *flags, environment={"PYTHONPATH": f"{root}"}, root=root) as server:
        yield server.url


def measure_server(url: str, body: bytes, requests: int, clients: int) -> float:
    """CPU milliseconds of one request.

    Raises:
        RuntimeError: A request was not answered 200.
    """
    before_s = read_metrics(url)[_CPU]
    load = asyncio.run(
        run_closed_loop(url, [body], clients=clients, may_go_on=lambda sent: sent < requests)
    )
    load.require_success(url)
    return 1e3 * (read_metrics(url)[_CPU] - before_s) / len(load.answers)


def measure(
    urls: dict[str, str], model: LoadedModel, body: bytes, options: argparse.Namespace
) -> dict[str, list[float]]:
    """CPU milliseconds of each, one number a round; the first round warms up."""
    rounds: dict[str, list[float]] = defaultdict(list)
    for number in range(options.rounds + 1):
        row = {
            name: measure_server(url, body, options.requests, options.clients)
            for name, url in urls.items()
        }
        bare = run_bare_loop(model, [body], threads=options.clients, seconds=options.bare_s)
        row[BARE] = bare.cpu_ms_per_image
        for name, cpu_ms in row.items() if number else ():
            rounds[name].append(cpu_ms)
    return rounds


def summarise(rounds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Rows of the table: medians, and ratios to the first."""
    first = next(iter(rounds.values()))
    rows = []
    for name, values in rounds.items():
        ratio = ratio_quartiles(values, first)
        rows.append(
            {
                "": name,
                "CPU ms a request": float(np.median(values)),
                "of the first, quartiles": show_quartiles(ratio),
            }
        )
    return rows


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.own_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tree", action="append", metavar="NAME=FOLDER", help="default: this one")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--requests", type=int, default=400, help="to each server in each round")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--bare-s", type=float, default=1, help="of the bare loop in each round")
    parser.add_argument("--threads", type=int, default=1, help="of one engine call")
    parser.add_argument("--out", type=Path, help="write the numbers, with the command")
    return parser


def main() -> None:
    options = build_parser().parse_args()
    trees = dict(entry.split("=", 1) for entry in options.tree or ["server=."])
    body = encode_picture(draw_picture(256, 256), "JPEG")
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = publish(Path(scratch) / "models", input=ONE_CANVAS)
        flags = ["--model-repo", f"{folder.parent}", "--device", "cpu"]
        flags += ["--threads", f"{options.threads}"]
        urls = {
            name: stack.enter_context(run_tree(Path(tree), Path(scratch) / f"{index}.log", *flags))
            for index, (name, tree) in enumerate(trees.items())
        }
        engine = BackendOptions(device="cpu", threads=options.threads)
        model = load_version(folder, options=engine)
        rounds = measure(urls, model, body, options)
        model.backend.close()
    rows = summarise(rounds)
    print(markdown_table(rows))
    if options.out is not None:
        payload = {
            "machine": describe_machine(PACKAGES),
            "clients": options.clients,
            "requests": options.requests,
            "cpu_ms": dict(rounds),
        }
        write_report(options.out, this_command("benchmarks.own_cost"), payload)


if __name__ == "__main__":
    main()
