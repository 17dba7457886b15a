"""python -m benchmarks.fleet: how many nodes a rate needs and what a million images cost.

Nothing is measured here: it multiplies what the other commands have measured, so it takes a moment.
The formulas are in docs/scaling.md. Without `--gpu` (the JSON of `python -m benchmarks.gpu`) what
depends on a GPU is "not measured".
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.report import markdown_table, this_command, write_report

RESULTS = Path("benchmarks/results")
UNKNOWN = "not measured"
Row = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What is asked for.

    Attributes:
        rate: Images a second, all regions' peak.
        cores, gpus: Of a node.
        gbit_s: Of a node's network.
        share: Of a node's rate that is planned with; the rest is for peaks and for latency.
        zones: Failure domains; the others carry the load when one is gone. 1: no spare.
    """

    rate: float
    cores: int
    gpus: int
    gbit_s: float
    share: float
    zones: int

    def count_nodes(self, node_images_s: float) -> int:
        """Nodes for the rate, as many in each zone, with one zone to spare."""
        needed = self.rate / (node_images_s * self.share)
        survivors = max(1, self.zones - 1)
        return math.ceil(needed / survivors) * self.zones

    def node_hours_a_million(self, node_images_s: float) -> float:
        """Node hours that a million images take; times a node's price it is their cost."""
        return 1e6 / (node_images_s * self.share * 3600)


def plan_cpu(fleet: Fleet, stages: Mapping[str, Any], server_ms: float) -> list[Row]:
    """Nodes without a GPU, for the images that the stages were measured with.

    Args:
        fleet: What is asked for.
        stages: Report of `python -m benchmarks --clock cpu`.
        server_ms: CPU time of a request that is the server's own.
    """
    totals = {name: row["total_ms"] for name, row in stages["rows"].items()}
    cases = [
        ("lightest", min(totals.values())),
        ("mean", fmean(totals.values())),
        ("heaviest", max(totals.values())),
    ]
    rows: list[Row] = []
    for name, pipeline_ms in cases:
        image_ms = pipeline_ms + server_ms
        node_images_s = 1e3 * fleet.cores / image_ms
        rows.append(
            {
                "image": name,
                "core ms": image_ms,
                "images/s of a core": 1e3 / image_ms,
                "images/s of a node": node_images_s,
                "nodes": fleet.count_nodes(node_images_s),
                "core hours a million": fleet.cores * fleet.node_hours_a_million(node_images_s),
            }
        )
    return rows


def plan_hosts(fleet: Fleet, decode: Mapping[str, Any]) -> list[Row]:
    """What JPEGs ask of a node's processors and network, whatever engine follows.

    Args:
        fleet: What is asked for.
        decode: Report of `python -m benchmarks.decode`.
    """
    rows: list[Row] = []
    for entry in decode["rows"]:
        height, width = entry["image_hw"]
        image_gbit = 8e-9 * entry["file_bytes"]
        rows.append(
            {
                "JPEG": f"{height}x{width}",
                "kB": entry["file_bytes"] / 1e3,
                "decode, core ms": entry["cpu_ms"]["server"],
                "Gbit/s for 1000 images/s": 1e3 * image_gbit,
                f"images/s that {fleet.gbit_s:g} Gbit/s carry": fleet.gbit_s / image_gbit,
            }
        )
    return rows


def plan_gpu(fleet: Fleet, gpu: Mapping[str, Any] | None) -> list[Row]:
    """Nodes with GPUs: their rate is the least that engines and processors allow.

    Args:
        fleet: What is asked for.
        gpu: Report of `python -m benchmarks.gpu`, or None.
    """
    if gpu is None:
        names = ("model", "images/s of a GPU", "core ms", "images/s of a node", "bound by")
        return [dict.fromkeys((*names, "nodes", "node hours a million"), UNKNOWN)]
    rows: list[Row] = []
    for row in gpu["rows"]:
        rates = [e["engine_images_per_s"] for e in row["batches"] if "engine_images_per_s" in e]
        if not rates or "postprocess" not in row:
            continue
        after = row["postprocess"]["nms_and_rle_ms"]
        host_ms = sum(part["median"] for part in (row["decode_ms"], row["prepare_ms"], after))
        bounds = {"GPUs": fleet.gpus * max(rates), "cores": 1e3 * fleet.cores / host_ms}
        bound = min(bounds, key=lambda name: bounds[name])
        rows.append(
            {
                "model": f"{row['model']}, {row['engine']} {row['precision']}",
                "images/s of a GPU": max(rates),
                "core ms": host_ms,
                "images/s of a node": bounds[bound],
                "bound by": bound,
                "nodes": fleet.count_nodes(bounds[bound]),
                "node hours a million": fleet.node_hours_a_million(bounds[bound]),
            }
        )
    return rows


def find_server_ms(own_cost: Mapping[str, Any]) -> float:
    """CPU time of a request beyond the bare loop, from `python -m benchmarks.own_cost`."""
    after, bare = (median(map(float, own_cost["cpu_ms"][name])) for name in ("after", "bare loop"))
    return after - bare


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fleet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--rate", type=float, default=1000, help="images a second (default: 1000)")
    add("--cores", type=int, default=64, help="of a node (default: 64)")
    add("--gpus", type=int, default=8, help="of a node (default: 8)")
    add("--gbit-s", type=float, default=25, help="of a node's network (default: 25)")
    add("--share", type=float, default=0.7, help="of a node's rate to plan with (default: 0.7)")
    add("--zones", type=int, default=3, help="one may be gone; 1: none to spare (default: 3)")
    add("--gpu", type=Path, help="JSON of python -m benchmarks.gpu")
    add("--out", type=Path, help="write the tables as JSON, with the command")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    fleet = Fleet(
        rate=options.rate,
        cores=options.cores,
        gpus=options.gpus,
        gbit_s=options.gbit_s,
        share=options.share,
        zones=options.zones,
    )
    server_ms = find_server_ms(json.loads((RESULTS / "own_cost.json").read_bytes()))
    tables = {
        "nodes without a GPU": plan_cpu(
            fleet, json.loads((RESULTS / "stages_cpu.json").read_bytes()), server_ms
        ),
        "hosts": plan_hosts(fleet, json.loads((RESULTS / "decode_cpu.json").read_bytes())),
        "nodes with GPUs": plan_gpu(fleet, options.gpu and json.loads(options.gpu.read_bytes())),
    }
    for rows in tables.values():
        print(markdown_table(rows) + "\n")
    if options.out:
        write_report(options.out, this_command("benchmarks.fleet"), {"tables": tables})


if __name__ == "__main__":
    main()
