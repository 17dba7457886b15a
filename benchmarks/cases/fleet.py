"""How many nodes a rate needs and what a million images cost, from measured results.

Nothing is measured here: the formulas of docs/scaling.md are applied to the results of `stages`,
`own_cost` and `decode`. Without --gpu (a result of `benchmarks gpu`) what depends on a GPU is "not
measured".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

from benchmarks.harness.report import RESULTS, ROOT, Report

UNKNOWN = "not measured"
Row = dict[str, object]


def fleet(
    *,
    rate: Annotated[float, "images a second"] = 1000,
    cores: Annotated[int, "of a node"] = 64,
    gpus: Annotated[int, "of a node"] = 8,
    gbit_s: Annotated[float, "of a node's network"] = 25,
    share: Annotated[float, "of a node's rate to plan with"] = 0.7,
    zones: Annotated[int, "one may fail; 1: no spare"] = 3,
    gpu: Annotated[Path | None, "JSON of benchmarks gpu"] = None,
) -> Report:
    wanted = Fleet(rate=rate, cores=cores, gpus=gpus, gbit_s=gbit_s, share=share, zones=zones)
    server_ms = find_server_ms(read_result("own_cost"))
    tables = {
        "nodes without a GPU": plan_cpu(wanted, read_result("stages"), server_ms),
        "hosts": plan_hosts(wanted, read_result("decode")),
        "nodes with GPUs": plan_gpu(wanted, json.loads(gpu.read_bytes()) if gpu else None),
    }
    return Report(data={"tables": tables}, tables=tables)


def read_result(name: str) -> dict[str, Any]:
    """The result of another benchmark."""
    content: dict[str, Any] = json.loads((ROOT / RESULTS / f"{name}.json").read_bytes())
    return content


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """The requirements.

    Attributes:
        rate: Images a second at the peak.
        cores, gpus: Of a node.
        gbit_s: Of a node's network.
        share: Of a node's rate that is planned with; the rest is for peaks and for latency.
        zones: Failure domains; the others carry the load when one fails. 1: no spare.
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
        fleet: The requirements.
        stages: Result of `benchmarks stages`.
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
                "images/s per core": 1e3 / image_ms,
                "images/s per node": node_images_s,
                "nodes": fleet.count_nodes(node_images_s),
                "core hours per million": fleet.cores * fleet.node_hours_a_million(node_images_s),
            }
        )
    return rows


def plan_hosts(fleet: Fleet, decode: Mapping[str, Any]) -> list[Row]:
    """What JPEGs need of a node's cores and network, whatever the engine.

    Args:
        fleet: The requirements.
        decode: Result of `benchmarks decode`.
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
                f"images/s at {fleet.gbit_s:g} Gbit/s": fleet.gbit_s / image_gbit,
            }
        )
    return rows


def plan_gpu(fleet: Fleet, gpu: Mapping[str, Any] | None) -> list[Row]:
    """Nodes with GPUs: their rate is the lower of what the GPUs and the cores allow.

    Args:
        fleet: The requirements.
        gpu: Result of `benchmarks gpu`, or None.
    """
    if gpu is None:
        names = ("model", "images/s per GPU", "core ms", "images/s per node", "bound by")
        return [dict.fromkeys((*names, "nodes", "node hours per million"), UNKNOWN)]
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
                "images/s per GPU": max(rates),
                "core ms": host_ms,
                "images/s per node": bounds[bound],
                "bound by": bound,
                "nodes": fleet.count_nodes(bounds[bound]),
                "node hours per million": fleet.node_hours_a_million(bounds[bound]),
            }
        )
    return rows


def find_server_ms(own_cost: Mapping[str, Any]) -> float:
    """CPU time of a request beyond the bare loop, from `benchmarks own_cost`."""
    after, bare = (median(map(float, own_cost["cpu_ms"][name])) for name in ("after", "bare loop"))
    return after - bare
