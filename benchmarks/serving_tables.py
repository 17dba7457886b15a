"""The tables and the picture of benchmarks.serving's report.

Numbers are medians over the rounds. A ratio is taken within each round, ours over theirs: its
median, and its quartiles in brackets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.plot import NO_PLOT, load_pyplot
from benchmarks.report import markdown_table, ratio_quartiles

OURS, BARE = "solo-serve", "bare loop"
Row = dict[str, Any]
SAME = "same"
LATENCIES: dict[float | str, str] = {
    0.7: "open loop at 70% of each server's own capacity",
    SAME: "open loop at one rate for all, 70% of the slowest server's capacity",
}


class Rounds:
    """One workload's rows, by server and round."""

    def __init__(self, rows: Sequence[Row], workload: str) -> None:
        self.rows = [row for row in rows if row["workload"] == workload]
        self.servers = list(dict.fromkeys(row["server"] for row in self.rows))
        asked = (row for row in self.rows if row["server"] != BARE and "clients" in row)
        self.clients = sorted({row["clients"] for row in asked})
        few = {0, len(self.clients) // 2, len(self.clients) - 1}
        self.shown_clients = [self.clients[index] for index in sorted(few)]

    def of_rounds(self, server: str, number: Callable[[list[Row]], float]) -> list[float]:
        """A number of each round's rows."""
        rounds: dict[int, list[Row]] = {}
        for row in self.rows:
            if row["server"] == server:
                rounds.setdefault(row["round"], []).append(row)
        return [number(rounds[index]) for index in sorted(rounds)]

    def median(self, server: str, number: Callable[[list[Row]], float]) -> float:
        """Over the rounds."""
        return float(np.median(self.of_rounds(server, number)))

    def ratio(self, server: str, number: Callable[[list[Row]], float]) -> str:
        """Ours over a server's."""
        if OURS not in self.servers:
            return "-"
        found = ratio_quartiles(self.of_rounds(OURS, number), self.of_rounds(server, number))
        return f"{found['ratio']:.2f} ({found['ratio_q1']:.2f}-{found['ratio_q3']:.2f})"


def best(rows: Sequence[Row]) -> Row:
    """The closed loop with the most images per second."""
    return max((row for row in rows if "clients" in row), key=lambda row: row["images_per_s"])


def capacity(rows: Sequence[Row]) -> float:
    """Its images per second."""
    return float(best(rows)["images_per_s"])


def at_clients(key: str, clients: int) -> Callable[[list[Row]], float]:
    """A number of the closed loop of so many clients."""
    return lambda rows: next(row[key] for row in rows if row.get("clients") == clients)


def at_load(key: str, load: float | str) -> Callable[[list[Row]], float]:
    """A number of the open loop at a share of the capacity."""
    return lambda rows: next(row[key] for row in rows if row.get("load") == load)


def render_tables(report: Row) -> str:
    """Markdown: versions and settings; for each workload throughput, latency, the client's use."""
    rows = [{"server": name, **about} for name, about in report["servers"].items()]
    parts = [markdown_table(rows)]
    for workload in dict.fromkeys(row["workload"] for row in report["rows"]):
        rounds = Rounds(report["rows"], workload)
        parts.append(f"`{workload}`, images per second in a closed loop:")
        parts.append(markdown_table([_throughput(rounds, name) for name in rounds.servers]))
        for load, title in LATENCIES.items():
            if not any(row.get("load") == load for row in rounds.rows):
                continue
            rows = [_latency(rounds, name, load) for name in rounds.servers if name != BARE]
            parts.append(f"`{workload}`, {title}:")
            parts.append(markdown_table(rows))
        most = max(row.get("client_cores", 0.0) for row in rounds.rows)
        parts.append(f"The client itself used at most {most:.2f} cores.")
    return "\n\n".join(parts)


def _throughput(rounds: Rounds, server: str) -> dict[str, object]:
    row: dict[str, object] = {"server": server}
    for clients in rounds.shown_clients:
        key = f"{clients} clients" if clients > 1 else "1 client"
        known = server != BARE
        row[key] = rounds.median(server, at_clients("images_per_s", clients)) if known else "-"
    row["best"] = rounds.median(server, capacity)
    row["ours over it"] = rounds.ratio(server, capacity)
    row["CPU ms per image"] = rounds.median(server, lambda rows: best(rows)["cpu_ms_per_image"])
    for key, title in (("peak_memory_mb", "memory, MB"), ("errors", "errors")):
        found = [row[key] for row in rounds.rows if row["server"] == server and key in row]
        total = sum(found) if key == "errors" else max(found, default=0.0)
        row[title] = round(total) if found else "-"
    return row


def _latency(rounds: Rounds, server: str, load: float | str) -> dict[str, object]:
    row: dict[str, object] = {"server": server}
    row["requests per second"] = rounds.median(server, at_load("per_second", load))
    for percentile in (50, 95, 99):
        number = at_load(f"p{percentile}_ms", load)
        row[f"p{percentile}, ms"] = rounds.median(server, number)
    row["our p99 over it"] = rounds.ratio(server, at_load("p99_ms", load))
    return row


def plot(report: Row, file: Path) -> str | None:
    """Draws throughput over clients, and p99 over the offered rate.

    Returns:
        Why there is no picture, None if there is one.
    """
    pyplot = load_pyplot()
    if pyplot is None:
        return NO_PLOT
    workloads = list(dict.fromkeys(row["workload"] for row in report["rows"]))
    figure, panels = pyplot.subplots(
        len(workloads), 2, figsize=(11, 4 * len(workloads)), squeeze=False, layout="constrained"
    )
    for (left, right), workload in zip(panels, workloads, strict=True):
        rounds = Rounds(report["rows"], workload)
        for server in rounds.servers:
            _draw(left, right, rounds, server)
        left.set(
            title=f"{workload}: closed loop", xlabel="clients", ylabel="images/s", xscale="log"
        )
        left.set_xticks(rounds.clients, labels=map(str, rounds.clients))
        left.minorticks_off()
        left.set_ylim(bottom=0)
        left.legend(fontsize="small")
        right.set(
            title=f"{workload}: open loop", xlabel="requests/s", ylabel="p99, ms", ylim=(0, None)
        )
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    return None


def _draw(left: Any, right: Any, rounds: Rounds, server: str) -> None:
    if server == BARE:
        left.axhline(rounds.median(server, capacity), color="grey", linestyle=":", label=server)
        return
    rates = [rounds.median(server, at_clients("images_per_s", n)) for n in rounds.clients]
    (line,) = left.plot(rounds.clients, rates, marker="o", markersize=3, label=server)
    points = []
    for load in {row["load"] for row in rounds.rows if "load" in row}:
        keys = ("per_second", "p99_ms")
        points.append([rounds.median(server, at_load(key, load)) for key in keys])
    offered, p99s = zip(*sorted(points), strict=True)
    right.plot(offered, p99s, marker="o", markersize=3, color=line.get_color())
