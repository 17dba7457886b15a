"""The server's own layer: CPU time of a request beside the bare loop's, and beside other checkouts.

    python -m benchmarks own_cost --trees before=../before after=.

In turns each server answers a closed loop of clients, and the bare loop runs for as long as
`--bare-s`. Ratios are to the first tree. The model is a tiny one, so that nearly all of the time is
the layer's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

from benchmarks.cases.bare import run_bare_loop
from benchmarks.harness.report import Report, describe_commit
from benchmarks.harness.rounds import take_turns
from benchmarks.harness.server import Server, measure_load, require_success, serve_ours
from benchmarks.ours import load_model
from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.slow_model import ONE_CANVAS

BARE = "bare loop"
COST = "cpu_ms_per_image"


def own_cost(
    *,
    trees: Annotated[tuple[str, ...], "NAME=FOLDER of checkouts"] = ("server=.",),
    rounds: Annotated[int, "that count"] = 8,
    requests: Annotated[int, "to each server in each round"] = 400,
    clients: Annotated[int, "in a closed loop"] = 16,
    bare_s: Annotated[float, "length of the bare loop in each round"] = 1,
    threads: Annotated[int, "of one engine call"] = 1,
) -> Report:
    folders = {name: Path(tree) for name, tree in (entry.split("=", 1) for entry in trees)}
    body = encode_picture(draw_picture(256, 256), "JPEG")
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        published = publish(Path(scratch) / "models", input=ONE_CANVAS)
        flags = [
            "--model-repo",
            f"{published.parent}",
            "--device",
            "cpu",
            "--threads",
            f"{threads}",
        ]

        def ask(server: Server) -> Callable[[], dict[str, float]]:
            def run() -> dict[str, float]:
                costs = measure_load(server, [body], clients=clients, requests=requests)
                require_success(costs, server)
                return {COST: costs[COST]}

            return run

        variants = {
            name: ask(
                stack.enter_context(serve_ours(Path(scratch) / f"{name}.log", *flags, root=root))
            )
            for name, root in folders.items()
        }
        model = load_model(published, threads)

        def run_bare() -> dict[str, float]:
            run = run_bare_loop(model, [body], threads=clients, seconds=bare_s)
            return {COST: run.cpu_ms_per_image}

        samples = take_turns({**variants, BARE: run_bare}, rounds)
        model.backend.close()
    first = next(iter(folders))
    rows = [
        {
            "": name,
            "CPU ms a request": samples.median(name, COST),
            "of the first (range)": str(samples.ratio(name, first, COST)),
        }
        for name in samples.values
    ]
    return Report(
        data={
            "commits": {name: describe_commit(root) for name, root in folders.items()},
            "clients": clients,
            "requests": requests,
            "cpu_ms": {name: values[COST] for name, values in samples.values.items()},
        },
        tables={"": rows},
        packages=("fastapi", "starlette", "uvicorn", "uvloop", "httptools"),
    )
