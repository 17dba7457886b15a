from __future__ import annotations

from benchmarks.cases.grpc import SHOWN, WAYS, grpc


def test_every_way_is_measured() -> None:
    report = grpc(clients=(2,), rounds=1, seconds=0.2)
    rows = report.tables[""]
    assert [row["way"] for row in rows] == list(WAYS)
    for row in rows:
        assert row["clients"] == 2
        assert all(float(str(row[name])) > 0 for name in SHOWN)
