"""Our server from two checkouts in turns: throughput, CPU time of an image, latency at 70% load.

    git worktree add ../before COMMIT
    python -m benchmarks before_after --before ../before

For each workload and number of worker processes, the servers of both checkouts run side by side
with this interpreter, and only one of them is asked at a time: closed loops, then an open loop at
70% of the slower one's capacity (its best closed loop of that round), which is one rate for both.
Answers are compared first; a difference is reported, not refused. Ratios are after over before.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from benchmarks.cases.serving import ask_all
from benchmarks.harness.report import ROOT, Report, Row, describe_commit
from benchmarks.harness.rounds import Samples, in_turn
from benchmarks.harness.server import Server, measure_load, require_success, serve_ours
from benchmarks.inputs import Workload, build_workload
from service.cores import count_cores

BEFORE, AFTER = "before", "after"
LOAD = 0.7
WorkloadName = Literal["light", "nuclei"]
SHOWN = {
    "images/s": "images_per_s",
    "CPU ms per image": "cpu_ms_per_image",
    "p50 at 70%, ms": "p50_ms",
    "p99 at 70%, ms": "p99_ms",
}


def before_after(
    *,
    before: Annotated[Path, "the other checkout"],
    after: Annotated[Path, "the checkout that is compared with it"] = ROOT,
    workloads: Annotated[tuple[WorkloadName, ...], "what is served"] = ("light", "nuclei"),
    workers: Annotated[tuple[int, ...], "worker processes"] = (1, max(2, count_cores())),
    clients: Annotated[tuple[int, ...], "of the closed loops"] = (1, 16),
    rounds: Annotated[int, "of each workload and number of workers"] = 5,
    seconds: Annotated[float, "of each load"] = 4,
) -> Report:
    trees = {BEFORE: before.resolve(), AFTER: after.resolve()}
    found: dict[str, Any] = {}
    rows: list[Row] = []
    notes = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for workload in (build_workload(one, folder) for one in workloads):
            for count in workers:
                title = f"{workload.name}, {count} worker{'s' if count > 1 else ''}"
                samples, differing = compare(
                    trees, workload, count, clients, rounds, seconds, folder
                )
                found[title] = {"values": samples.values, "differing_answers": differing}
                rows += [{"": title, **row} for row in build_rows(samples)]
                notes += [f"{title}: other answers to {', '.join(differing)}"] if differing else []
    commits = {side: describe_commit(tree) for side, tree in trees.items()}
    data = {"commits": commits, "rounds": rounds, "seconds": seconds, "found": found, "rows": rows}
    return Report(data=data, tables={"": rows}, notes=notes, packages=("uvicorn", "aiohttp"))


def compare(
    trees: Mapping[str, Path],
    workload: Workload,
    workers: int,
    clients: tuple[int, ...],
    rounds: int,
    seconds: float,
    folder: Path,
) -> tuple[Samples, list[str]]:
    """The numbers of both servers, and the images that they answer differently."""
    flags = ["--model-repo", f"{workload.model.parent}", "--workers", f"{workers}"]
    flags += ["--device", "cpu", "--log-level", "warning"]
    bodies = list(workload.images.values())
    log = f"{workload.name}-{workers}"
    with (
        serve_ours(folder / f"{log}-before.log", *flags, root=trees[BEFORE]) as first,
        serve_ours(folder / f"{log}-after.log", *flags, root=trees[AFTER]) as second,
    ):
        servers = {BEFORE: first, AFTER: second}
        answers = {side: ask_all(server.url, workload) for side, server in servers.items()}
        differing = [n for n, a in answers[BEFORE].items() if answers[AFTER].get(n) != a]
        samples = Samples({BEFORE: {}, AFTER: {}})
        for number in range(-1, rounds):  # the first warms up
            costs = {}
            for side in in_turn(servers, number):
                loads = [measure(servers[side], bodies, seconds, clients=n) for n in clients]
                best = max(loads, key=lambda load: load["images_per_s"])
                costs[side] = {name: best[name] for name in ("images_per_s", "cpu_ms_per_image")}
            rate = LOAD * min(of_side["images_per_s"] for of_side in costs.values())
            for side in in_turn(servers, number):
                load = measure(servers[side], bodies, seconds, per_second=rate)
                costs[side] |= {"per_second": rate}
                costs[side] |= {name: load[name] for name in ("p50_ms", "p95_ms", "p99_ms")}
            for side, of_side in costs.items() if number >= 0 else ():
                samples.add(side, of_side)
            print(f"{log} workers: round {number}", file=sys.stderr)
    return samples, differing


def measure(server: Server, bodies: list[bytes], seconds: float, **how: Any) -> dict[str, float]:
    """A load that must succeed."""
    costs = measure_load(server, bodies, seconds=seconds, **how)
    require_success(costs, server)
    return costs


def build_rows(samples: Samples) -> list[Row]:
    """A row for each number."""
    return [
        {
            "number": title,
            BEFORE: samples.median(BEFORE, name),
            AFTER: samples.median(AFTER, name),
            "after / before (range)": str(samples.ratio(AFTER, BEFORE, name)),
        }
        for title, name in SHOWN.items()
    ]
