"""Our server against others: the same graph, steps and images, each with settings that suit it.

    python -m benchmarks.serving --install             # the others, into environments of their own
    python -m benchmarks.serving --out benchmarks/results/serving.json

First every server's answers are compared with ours. Then rounds: in each one server after the
other is started, warmed up, asked by a growing number of clients in a closed loop, asked at rates
that are shares of what it did there, and ended; the order turns round every time. All of them share
the cores with the client, whose use of them is reported. The bare loop (`benchmarks.bare`) runs in
the same rounds: the steps without any server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from benchmarks.load import Load, run_at_rate, run_closed_loop
from benchmarks.report import describe_machine, this_command, write_report
from benchmarks.servers.contenders import (
    CONTENDERS,
    ONE_BLAS_THREAD,
    OURS,
    Contender,
    describe_missing,
    install,
)
from benchmarks.servers.process import ServerProcesses
from benchmarks.serving_tables import BARE, SAME, capacity, plot, render_tables
from benchmarks.workloads import Workload, build_light, build_nuclei
from service.cores import count_cores

SAME_LOAD = 0.7
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is asked of each server in a round.

    Attributes:
        rounds: How many.
        clients: Of the closed loops, one after the other.
        closed_s: Length of each.
        loads: Of the open loops: shares of the server's capacity, which is its best closed loop;
            or `SAME`, one rate for all.
        open_s: Length of each.
        warm_up_clients: Of the closed loop before that.
        warm_up_s: Its length.
    """

    rounds: int
    clients: tuple[int, ...]
    closed_s: float
    loads: tuple[float | str, ...]
    open_s: float
    warm_up_clients: int
    warm_up_s: float


PLANS = {
    "light": Plan(3, (1, 4, 16, 64), 1.5, (SAME, 0.7), 2.5, 8, 1.0),
    "nuclei": Plan(3, (1, 8), 6.0, (0.7,), 5.0, 4, 1.5),
}


class WrongAnswer(Exception):
    """A server does not answer what ours does."""


def find_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def run_contender(
    contender: Contender, workload: Workload, cores: int, log: Path
) -> Iterator[tuple[str, ServerProcesses]]:
    """A server that answers, with its address; ended afterwards.

    One that does not come up is started once more: Ray gives up early on a busy machine.
    """
    try:
        url, processes = start(contender, workload, cores, log)
    except RuntimeError:
        url, processes = start(contender, workload, cores, log)
    try:
        yield url, processes
    finally:
        processes.stop()


def start(
    contender: Contender, workload: Workload, cores: int, log: Path
) -> tuple[str, ServerProcesses]:
    """Starts a server and waits until it answers an image.

    Raises:
        RuntimeError: It did not come up; with the end of its output.
    """
    port = find_port()
    url = f"http://127.0.0.1:{port}"
    body = next(iter(workload.images.values()))

    def is_ready() -> bool:
        try:
            return httpx.post(f"{url}/segment", content=body, timeout=10).status_code == 200
        except httpx.HTTPError:
            return False

    processes = contender.start(workload.model, port, cores, log)
    try:
        processes.wait_until(is_ready)
    except BaseException:
        processes.stop()
        raise
    return url, processes


def ask_all(url: str, workload: Workload) -> dict[str, Any]:
    """The answer to each of the workload's images, but for what differs from run to run."""
    answers = {}
    with httpx.Client(base_url=url, timeout=120) as client:
        for name, data in (workload.images | workload.others).items():
            answer = client.post("/segment", content=data).raise_for_status().json()
            answer.pop("timing_ms", None)
            answers[name] = answer
    return answers


def check_answers(name: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compares a server's answers with ours.

    Raises:
        WrongAnswer: Names the first image whose answer differs.
    """
    for image, answer in expected.items():
        if found.get(image) != answer:
            raise WrongAnswer(f"{name} answers {image} otherwise: {found.get(image)}"[:500])


def summarise(load: Load, seconds: float) -> Row:
    """The numbers of one load.

    Args:
        load: All of it.
        seconds: From its beginning to the last answer. Counting what is done within a shorter time
            would depend on where batches end, or give credit for images that only wait.
    """
    row: Row = {"requests": len(load.answers)}
    row["errors"] = len(load.answers) - load.statuses[200]
    row["images_per_s"] = load.statuses[200] / seconds
    row |= {f"p{p}_ms": 1e3 * load.seconds_at(p, 200) for p in (50, 95, 99)}
    return row


def measure(
    processes: ServerProcesses, url: str, bodies: Sequence[bytes], seconds: float, **how: float
) -> Row:
    """One load, and what it took of the machine.

    Args:
        processes: The server's.
        url: Its address.
        bodies: Images.
        seconds: How long requests are sent.
        **how: `clients` of a closed loop, or `per_second` of an open one.
    """
    began_s, client_began_s = time.monotonic(), time.process_time()
    with processes.measure() as usage:
        if "clients" in how:
            end_s = began_s + seconds
            load = asyncio.run(
                run_closed_loop(
                    url,
                    bodies,
                    clients=int(how["clients"]),
                    may_go_on=lambda sent: time.monotonic() < end_s,
                )
            )
        else:
            rate = max(how["per_second"], 1 / seconds)  # a server may have done nothing
            count = round(rate * seconds)
            load = asyncio.run(run_at_rate(url, bodies, per_second=rate, count=count))
    took_s = time.monotonic() - began_s
    return {
        **how,
        **summarise(load, took_s),
        "cpu_ms_per_image": 1e3 * usage.cpu_s / max(1, len(load.answers)),
        "server_cores": usage.cpu_s / took_s,
        "client_cores": (time.process_time() - client_began_s) / took_s,
        "peak_memory_mb": usage.peak_memory_bytes / 1e6,
    }


def visit(
    contender: Contender,
    workload: Workload,
    plan: Plan,
    cores: int,
    log: Path,
    same_rate: float,
) -> list[Row]:
    """One server's part of a round.

    Args:
        contender: The server.
        workload: Model and images.
        plan: Loads.
        cores: For the server.
        log: Its output's file.
        same_rate: Requests per second of the open loop that is the same for all.
    """
    bodies = list(workload.images.values())
    rows = []
    with run_contender(contender, workload, cores, log) as (url, processes):
        warm_up(processes, url, workload, plan)
        for clients in plan.clients:
            rows.append(measure(processes, url, bodies, plan.closed_s, clients=clients))
        most = capacity(rows)
        for load in plan.loads:
            rate = same_rate if isinstance(load, str) else load * most
            row = measure(processes, url, bodies, plan.open_s, per_second=rate)
            rows.append({"load": load, **row})
    return [{"server": contender.name, **row} for row in rows]


def run_bare(folder: Path, workload: Workload, cores: int, seconds: float) -> Row:
    """The bare loop: a process of its own for each core, all at once."""
    for name, data in workload.images.items():
        (folder / name).write_bytes(data)
    command = [sys.executable, "-m", "benchmarks.bare", "--model", str(workload.model)]
    command += ["--images", str(folder), "--threads", "1", "--seconds", str(seconds)]
    variables = os.environ | ONE_BLAS_THREAD
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables)
        for _ in range(cores)
    ]
    found = []
    for process in started:
        output, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"the bare loop ended with exit status {process.returncode}")
        found.append(json.loads(output))
    images = sum(one["images"] for one in found)
    cpu_ms = sum(one["images"] * one["cpu_ms_per_image"] for one in found)
    return {
        "server": BARE,
        "clients": cores,
        "images_per_s": sum(one["images_per_s"] for one in found),
        "cpu_ms_per_image": cpu_ms / images,
    }


def check_all(
    contenders: Sequence[Contender], workload: Workload, plan: Plan, cores: int, folder: Path
) -> float:
    """Compares the answers of all with those of the first.

    Returns:
        The slowest server's capacity, images per second.
    """
    expected: dict[str, Any] = {}
    capacities = []
    for contender in contenders:
        with run_contender(contender, workload, cores, folder / "log") as (url, processes):
            answers = ask_all(url, workload)
            expected = expected or answers
            check_answers(contender.name, answers, expected)
            for _ in range(2):  # the first time it is still cold
                row = warm_up(processes, url, workload, plan)
            capacities.append(float(row["images_per_s"]))
        print(f"{workload.name}: {contender.name} answers all images alike", file=sys.stderr)
    return min(capacities)


def warm_up(processes: ServerProcesses, url: str, workload: Workload, plan: Plan) -> Row:
    """A load that is in no table."""
    bodies = list(workload.images.values())
    return measure(processes, url, bodies, plan.warm_up_s, clients=plan.warm_up_clients)


def run_round(
    number: int,
    contenders: Sequence[Contender],
    workload: Workload,
    plan: Plan,
    cores: int,
    folder: Path,
    same_rate: float,
) -> list[Row]:
    """Each server's part of a round, and the bare loop's; every other round the other way round."""
    rows = []
    names = [contender.name for contender in contenders]
    for name in ([*names, BARE], [BARE, *reversed(names)])[number % 2]:
        began_s = time.monotonic()
        if name == BARE:
            images = folder / f"{workload.name}-images"
            images.mkdir(exist_ok=True)
            rows.append(run_bare(images, workload, cores, 3 * plan.closed_s))
        else:
            rows += visit(CONTENDERS[name], workload, plan, cores, folder / "log", same_rate)
        took_s = time.monotonic() - began_s
        print(f"{workload.name}, round {number}: {name}, {took_s:.0f} s", file=sys.stderr)
    return [{"workload": workload.name, "round": number, **row} for row in rows]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--install",
        nargs="*",
        choices=CONTENDERS,
        metavar="SERVER",
        help="make the environments of these servers (default: of all) and end",
    )
    parser.add_argument("--servers", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--workloads", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--rounds", type=int, help="of each workload (default: light 3, nuclei 2)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the length of every load")
    parser.add_argument("--clients", type=int, nargs="+", help="of the closed loops")
    parser.add_argument("--out", type=Path, help="a JSON file; a picture is put beside it")
    return parser


def build_plan(name: str, arguments: argparse.Namespace) -> Plan:
    """The workload's plan as the options change it."""
    plan = PLANS[name]
    return replace(
        plan,
        rounds=arguments.rounds or plan.rounds,
        clients=tuple(arguments.clients or plan.clients),
        closed_s=plan.closed_s * arguments.scale,
        open_s=plan.open_s * arguments.scale,
        warm_up_s=plan.warm_up_s * arguments.scale,
    )


def choose(names: Sequence[str]) -> tuple[list[Contender], list[str]]:
    """The servers that are installed, ours first, and a line for each of the others."""
    chosen = [CONTENDERS[name] for name in CONTENDERS if name in {OURS, *names}]
    return [c for c in chosen if c.is_installed], describe_missing(chosen)


def compare(
    arguments: argparse.Namespace, contenders: Sequence[Contender], folder: Path
) -> list[Row]:
    """Checks and measures everything."""
    cores = count_cores()
    rows: list[Row] = []
    for name in arguments.workloads:
        workload = build_light(folder / "repo") if name == "light" else build_nuclei()
        plan = build_plan(name, arguments)
        same_rate = SAME_LOAD * check_all(contenders, workload, plan, cores, folder)
        for number in range(plan.rounds):
            rows += run_round(number, contenders, workload, plan, cores, folder, same_rate)
    return rows


def main() -> None:
    arguments = build_parser().parse_args()
    if arguments.install is not None:
        install(arguments.install or CONTENDERS)
        return
    contenders, missing = choose(arguments.servers)
    print("\n".join(missing), file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(arguments, contenders, Path(folder))
    report = {
        "machine": describe_machine(("uvicorn", "aiohttp")),
        "servers": {
            c.name: {"version": c.read_version(), "settings": c.settings} for c in contenders
        },
        "missing": missing,
        "rows": rows,
    }
    print(render_tables(report))
    if arguments.out is not None:
        write_report(arguments.out, this_command("benchmarks.serving"), report)
        print(plot(report, arguments.out.with_suffix(".png")) or "", file=sys.stderr)


if __name__ == "__main__":
    main()
