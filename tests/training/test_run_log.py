from __future__ import annotations

from pathlib import Path

from training.run_log import RunLog


def test_a_resumed_log_drops_later_and_broken_rows(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,name,value\n1,a,1\n2,a,2\n3,a,3\n4,")
    with RunLog(tmp_path, 2) as log:
        log.write(3, {"a": 7.0})
    assert (tmp_path / "metrics.csv").read_text().split() == [
        "step,name,value",
        "1,a,1",
        "2,a,2",
        "3,a,7",
    ]
    with RunLog(tmp_path, 0):
        pass
    assert (tmp_path / "metrics.csv").read_text().split() == ["step,name,value"]
