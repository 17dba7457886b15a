from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import own_cost


def test_ratios_are_to_the_first() -> None:
    rows = own_cost.summarise({"a": [2.0, 4.0, 6.0], "b": [1.0, 2.0, 3.0]})
    assert [list(row.values()) for row in rows] == [
        ["a", 4.0, "1.00, 1.00, 1.00"],
        ["b", 2.0, "0.50, 0.50, 0.50"],
    ]


def test_the_command_measures_this_tree_beside_the_bare_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "own.json"
    flags = "--rounds 1 --requests 8 --clients 2 --bare-s 0.1 --out"
    monkeypatch.setattr("sys.argv", ["own_cost", *flags.split(), f"{out}"])
    own_cost.main()
    report = json.loads(out.read_text())
    assert set(report["cpu_ms"]) == {"server", own_cost.BARE}
    assert all(values[0] > 0 for values in report["cpu_ms"].values())
    assert "| server |" in capsys.readouterr().out
