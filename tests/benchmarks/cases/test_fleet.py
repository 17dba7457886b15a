from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cases.fleet import UNKNOWN, Fleet, find_server_ms, plan_cpu, plan_gpu, plan_hosts

ROOT = Path(__file__).resolve().parents[3]
FLEET = Fleet(rate=1000, cores=10, gpus=4, gbit_s=8, share=0.5, zones=3)


@pytest.mark.parametrize(
    ("zones", "node_images_s", "nodes"),
    [(1, 200, 10), (3, 200, 15), (3, 190, 18), (2, 200, 20), (3, 1e6, 3), (1, 1e6, 1)],
)
def test_the_zones_that_are_left_carry_the_rate(
    zones: int, node_images_s: float, nodes: int
) -> None:
    wanted = Fleet(rate=1000, cores=1, gpus=1, gbit_s=1, share=0.5, zones=zones)
    assert wanted.count_nodes(node_images_s) == nodes


def test_nodes_without_a_gpu() -> None:
    stages = {"rows": {"a": {"total_ms": 98.0}, "b": {"total_ms": 198.0}}}
    light, mean, heavy = plan_cpu(FLEET, stages, 2.0)
    assert (light["core ms"], mean["core ms"], heavy["core ms"]) == (100, 150, 200)
    assert light["images/s per node"] == pytest.approx(100)
    assert light["nodes"] == 30
    # A million images of 0.1 s are 1e5 core seconds, and only half of a node is planned with.
    assert light["core hours per million"] == pytest.approx(2 * 1e5 / 3600)


def test_what_images_ask_of_the_network() -> None:
    entry = {"image_hw": [480, 640], "file_bytes": 100_000, "cpu_ms": {"server": 2.0}}
    (row,) = plan_hosts(FLEET, {"rows": [entry]})
    assert row["Gbit/s for 1000 images/s"] == pytest.approx(0.8)
    assert row["images/s at 8 Gbit/s"] == pytest.approx(10_000)


def gpu_row(host_ms: float) -> dict[str, Any]:
    part = {"median": host_ms / 4}
    return {
        "model": "solo_r50",
        "engine": "trt",
        "precision": "fp16",
        "batches": [{"engine_images_per_s": 100.0}, {"engine_images_per_s": 250.0}, {"error": "x"}],
        "decode_ms": part,
        "prepare_ms": part,
        "postprocess": {"nms_and_rle_ms": {"median": host_ms / 2}},
    }


def test_a_gpu_node_is_as_fast_as_the_slower_of_engines_and_processors() -> None:
    unfinished = {**gpu_row(1.0), "batches": [{"error": "no memory"}]}
    rows = plan_gpu(FLEET, {"rows": [gpu_row(5.0), gpu_row(20.0), unfinished]})
    assert [(row["bound by"], row["images/s per node"]) for row in rows] == [
        ("GPUs", 1000.0),
        ("cores", 500.0),
    ]
    assert [row["nodes"] for row in rows] == [3, 6]
    assert rows[0]["node hours per million"] == pytest.approx(1e6 / (1000 * 0.5 * 3600))


def test_without_a_measurement_nothing_is_said_of_gpus() -> None:
    (row,) = plan_gpu(FLEET, None)
    assert set(row.values()) == {UNKNOWN}


def test_the_servers_own_cost_is_what_the_bare_loop_has_not() -> None:
    assert find_server_ms({"cpu_ms": {"after": [3, 1, 2], "bare loop": [0.5, 9, 1.5]}}) == 0.5


def test_the_tables_of_the_documentation_are_those_of_the_results(
    capsys: pytest.CaptureFixture[str], run_case: Callable[..., Any]
) -> None:
    report = run_case("fleet")
    tables = [part for part in capsys.readouterr().out.split("\n\n") if part.startswith("|")]
    documented = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert all(table in documented for table in tables[:2])
    assert len(report["tables"]["nodes without a GPU"]) == len(report["tables"]["hosts"]) == 3
