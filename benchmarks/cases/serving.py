"""Our server beside other frameworks: the same graph, steps and images behind each.

    python -m benchmarks serving --install             # the others, in environments of their own
    python -m benchmarks serving --plot benchmarks/results/serving.png

All run ONNX Runtime in fp32, except `solo-serve-auto`, which chooses its engine itself. First every
other server's answers are compared with ours. In each round one server after the other is
started, warmed up, asked by a growing number of clients in a closed loop, asked in an open loop at
rates that are shares of its best closed loop, and stopped; every other round in the reverse order.
All share the cores with the client, whose use of them is reported. The bare loop (the same steps
without a server, a process for each core) runs in the same rounds.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx

from benchmarks.cases.bare import run_bare_processes
from benchmarks.harness import BenchmarkError
from benchmarks.harness.plots import Panel
from benchmarks.harness.report import Report, Row
from benchmarks.harness.rounds import Samples, take_turns
from benchmarks.harness.server import Server, measure_load
from benchmarks.inputs import Workload, build_workload
from benchmarks.servers.contenders import CONTENDERS, OURS, Contender, describe_missing
from benchmarks.servers.contenders import install as install_environments
from service.cores import count_cores

BARE = "bare loop"
LOAD = 0.7
SAME_RATE = "one rate for all, 70% of the slowest server's capacity"
OWN_RATE = "70% of each server's own capacity"
BEST = "best"
WorkloadName = Literal["light", "nuclei"]


@dataclass(frozen=True)
class LoadPlan:
    """The loads on each server in a round.

    Attributes:
        clients: Of the closed loops, one after the other.
        closed_s: Length of each.
        open_s: Length of each open loop.
        same_rate: Whether there is also an open loop at one rate for all servers.
        warm_up_s: Length of the closed loop of 8 clients before all.
    """

    clients: tuple[int, ...]
    closed_s: float
    open_s: float
    same_rate: bool
    warm_up_s: float


PLANS = {
    "light": LoadPlan((1, 4, 16, 64), 1.5, 2.5, True, 1.0),
    "nuclei": LoadPlan((1, 8), 6.0, 5.0, False, 1.5),
}


def serving(
    *,
    install: Annotated[bool, "make the environments of the servers and exit"] = False,
    servers: Annotated[tuple[str, ...], "servers to compare with ours"] = tuple(CONTENDERS),
    workloads: Annotated[tuple[WorkloadName, ...], "what is served"] = ("light", "nuclei"),
    rounds: Annotated[int, "of each workload"] = 3,
    scale: Annotated[float, "factor of the length of every load"] = 1.0,
    clients: Annotated[tuple[int, ...] | None, "of the closed loops"] = None,
) -> Report:
    unknown = [name for name in servers if name not in CONTENDERS]
    if unknown:
        raise BenchmarkError(f"no server {unknown[0]!r}, expected {', '.join(CONTENDERS)}")
    if install:
        install_environments(servers)
        return Report(data={}, notes=[f"installed: {', '.join(servers)}"])
    contenders, missing = choose(servers)
    print("\n".join(missing), file=sys.stderr)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in workloads:
            workload = build_workload(name, Path(folder))
            plan = scale_plan(PLANS[name], scale, clients)
            found[name] = compare(contenders, workload, plan, rounds, Path(folder))
    about = {c.name: {"version": c.read_version(), "settings": c.settings} for c in contenders}
    tables: dict[str, list[Row]] = {"": [{"server": n, **row} for n, row in about.items()]}
    for name, samples in found.items():
        tables |= build_tables(name, samples)
    data = {
        "servers": about,
        "missing": missing,
        "workloads": {n: s.values for n, s in found.items()},
    }
    panels = [panel for name, samples in found.items() for panel in build_panels(name, samples)]
    return Report(
        data=data, tables=tables, notes=missing, packages=("uvicorn", "aiohttp"), panels=panels
    )


def choose(names: Sequence[str]) -> tuple[list[Contender], list[str]]:
    """The servers that are installed, ours first, and a line for each of the others."""
    chosen = [CONTENDERS[name] for name in CONTENDERS if name in {OURS, *names}]
    return [c for c in chosen if c.is_installed], describe_missing(chosen)


def scale_plan(plan: LoadPlan, scale: float, clients: tuple[int, ...] | None) -> LoadPlan:
    """The plan with other lengths and clients."""
    return replace(
        plan,
        clients=clients or plan.clients,
        closed_s=plan.closed_s * scale,
        open_s=plan.open_s * scale,
        warm_up_s=plan.warm_up_s * scale,
    )


def compare(
    contenders: Sequence[Contender], workload: Workload, plan: LoadPlan, rounds: int, folder: Path
) -> Samples:
    """Checks the answers, then measures all servers and the bare loop in turns."""
    cores, log = count_cores(), folder / "log"
    slowest = check_all(contenders, workload, plan, cores, log)
    same_rate = LOAD * slowest if plan.same_rate else None
    variants = {
        contender.name: partial(visit, contender, workload, plan, cores, log, same_rate)
        for contender in contenders
    }

    def run_bare() -> dict[str, float]:
        costs = run_bare_processes(workload, cores, 3 * plan.closed_s)
        return {f"{BEST}/{name}": value for name, value in costs.items()}

    def tell(text: str) -> None:
        print(f"{workload.name}, {text}", file=sys.stderr)

    return take_turns({**variants, BARE: run_bare}, rounds, warm_ups=0, tell=tell)


def check_all(
    contenders: Sequence[Contender], workload: Workload, plan: LoadPlan, cores: int, log: Path
) -> float:
    """Compares the answers of all that have one engine with those of the first.

    Returns:
        The slowest server's capacity, images per second.
    """
    expected: dict[str, Any] = {}
    capacities = []
    for contender in contenders:
        with contender.run(workload, cores, log) as server:
            found = ask_all(server.url, workload)
            expected = expected or found
            if contender.same_engine:
                check_answers(contender.name, found, expected)
                print(f"{workload.name}: {contender.name} gives the same answers", file=sys.stderr)
            for _ in range(2):  # the first one warms up
                costs = warm_up(server, workload, plan)
            capacities.append(costs["images_per_s"])
    return min(capacities)


def warm_up(server: Server, workload: Workload, plan: LoadPlan) -> dict[str, float]:
    """A closed loop of 8 clients."""
    return measure_load(server, [*workload.images.values()], seconds=plan.warm_up_s, clients=8)


def ask_all(url: str, workload: Workload) -> dict[str, Any]:
    """Size and instances in the answer to each of the workload's images."""
    answers = {}
    with httpx.Client(base_url=url, timeout=120) as client:
        for name, data in (workload.images | workload.others).items():
            answer = client.post("/segment", content=data).raise_for_status().json()
            (entry,) = answer["results"]
            answers[name] = {key: entry[key] for key in ("width", "height", "instances")}
    return answers


def check_answers(name: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compares a server's answers with ours.

    Raises:
        BenchmarkError: Names the first image whose answer differs.
    """
    for image, answer in expected.items():
        if found.get(image) != answer:
            raise BenchmarkError(f"{name}: other answer to {image}: {found.get(image)}"[:500])


def visit(
    contender: Contender,
    workload: Workload,
    plan: LoadPlan,
    cores: int,
    log: Path,
    same_rate: float | None,
) -> dict[str, float]:
    """One server's part of a round: the numbers of each load as `LOAD/NUMBER`."""
    bodies = list(workload.images.values())
    loads: dict[str, dict[str, float]] = {}
    with contender.run(workload, cores, log) as server:
        warm_up(server, workload, plan)
        for count in plan.clients:
            loads[f"{count} clients"] = measure_load(
                server, bodies, seconds=plan.closed_s, clients=count
            )
        best = max(loads.values(), key=lambda costs: costs["images_per_s"])
        rates = {OWN_RATE: LOAD * best["images_per_s"]}
        if same_rate is not None:
            rates[SAME_RATE] = same_rate
        for load, rate in rates.items():
            costs = measure_load(server, bodies, seconds=plan.open_s, per_second=rate)
            loads[load] = {"per_second": rate, **costs}
    every = {
        "errors": sum(costs["errors"] for costs in loads.values()),
        "peak_memory_mb": max(costs["peak_memory_mb"] for costs in loads.values()),
        "client_cores": max(costs["client_cores"] for costs in loads.values()),
    }
    loads[BEST] = best
    flat = {f"{load}/{n}": value for load, costs in loads.items() for n, value in costs.items()}
    return {**flat, **every}


def list_clients(samples: Samples) -> list[int]:
    """Clients of the closed loops."""
    names = [name for name in samples.values[OURS] if name.endswith(" clients/images_per_s")]
    return [int(name.split()[0]) for name in names]


def build_tables(workload: str, samples: Samples) -> Mapping[str, list[Row]]:
    """Throughput and latency: medians over the rounds, ratios with their ranges."""
    counts = list_clients(samples)
    few = [counts[i] for i in sorted({0, len(counts) // 2, len(counts) - 1})]

    def cell(server: str, name: str) -> object:
        return samples.median(server, name) if name in samples.values[server] else "-"

    def ratio(server: str, name: str) -> str:
        return str(samples.ratio(OURS, server, name))

    throughput = [
        {
            "server": server,
            **{f"{n} clients": cell(server, f"{n} clients/images_per_s") for n in few},
            "best": cell(server, f"{BEST}/images_per_s"),
            "ours over it": ratio(server, f"{BEST}/images_per_s"),
            "CPU ms per image": cell(server, f"{BEST}/cpu_ms_per_image"),
            "memory, MB": cell(server, "peak_memory_mb"),
            "errors": sum(samples.values[server].get("errors", [])),
            "client's cores": cell(server, "client_cores"),
        }
        for server in samples.values
    ]
    tables = {f"`{workload}`, images per second in a closed loop": throughput}
    for load in (OWN_RATE, SAME_RATE):
        if f"{load}/p99_ms" not in samples.values[OURS]:
            continue
        tables[f"`{workload}`, open loop at {load}"] = [
            {
                "server": server,
                "requests per second": cell(server, f"{load}/per_second"),
                **{f"p{p}, ms": cell(server, f"{load}/p{p}_ms") for p in (50, 95, 99)},
                "our p99 over it": ratio(server, f"{load}/p99_ms"),
            }
            for server in samples.values
            if server != BARE
        ]
    return tables


def build_panels(workload: str, samples: Samples) -> list[Panel]:
    """Throughput over clients, and p99 over the offered rate."""
    servers = [name for name in samples.values if name != BARE]
    counts = list_clients(samples)
    rates = {
        server: [(n, samples.median(server, f"{n} clients/images_per_s")) for n in counts]
        for server in servers
    }
    p99 = {}
    for server in servers:
        loads = [
            load for load in (OWN_RATE, SAME_RATE) if f"{load}/p99_ms" in samples.values[server]
        ]
        keys = ("per_second", "p99_ms")
        points = [tuple(samples.median(server, f"{load}/{key}") for key in keys) for load in loads]
        p99[server] = [(x, y) for x, y in sorted(points)]
    bare = {BARE: samples.median(BARE, f"{BEST}/images_per_s")}
    return [
        Panel(
            title=f"{workload}: closed loop",
            x="clients",
            y="images/s",
            lines=rates,
            levels=bare,
            log="x",
        ),
        Panel(title=f"{workload}: open loop", x="requests/s", y="p99, ms", lines=p99),
    ]
