from __future__ import annotations

from benchmarks.cluster import ONE, SINGLE, TWO, summarise


def test_a_row_compares_with_one_worker_round_by_round() -> None:
    rounds = {
        name: [{"images_per_s": rate, "p50_ms": 10.0, "p95_ms": 20.0} for rate in rates]
        for name, rates in ((SINGLE, (6.0, 3.0)), (ONE, (4.0, 2.0)), (TWO, (8.0, 4.0)))
    }
    single, one, two = summarise(rounds)
    assert single["images/s"] == 4.5
    assert one["of 1 worker, quartiles"] == "1.00, 1.00, 1.00"
    assert two["of 1 worker, quartiles"] == "2.00, 2.00, 2.00"
