from __future__ import annotations

from benchmarks.cases.cluster import ONE, SINGLE, TWO, build_rows
from benchmarks.harness.rounds import Samples


def test_a_row_compares_with_one_worker_round_by_round() -> None:
    common = {"p50_ms": [10.0] * 2, "p95_ms": [20.0] * 2, "cpu_ms_per_image": [5.0] * 2}
    rates = {SINGLE: [6.0, 3.0], ONE: [4.0, 2.0], TWO: [8.0, 4.0]}
    samples = Samples({name: {"images_per_s": rate, **common} for name, rate in rates.items()})
    single, one, two = build_rows(samples)
    assert single["images/s"] == 4.5
    assert one["of 1 worker (range)"] == "1 (1-1)"
    assert two["of 1 worker (range)"] == "2 (2-2)"
