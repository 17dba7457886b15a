from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.report import (
    describe_machine,
    markdown_table,
    ratio_quartiles,
    show_quartiles,
    this_command,
    write_report,
)


def test_the_machine_is_described_without_its_name() -> None:
    machine = describe_machine(["pytest", "no-such-distribution"])
    assert machine["cores"] >= 1
    assert machine["memory_gb"] >= 1
    assert machine["cpu"]
    assert machine["versions"]["pytest"] == pytest.__version__
    assert machine["versions"]["no-such-distribution"] is None
    assert set(machine) == {"cpu", "cores", "memory_gb", "system", "python", "versions"}


def test_ratios_are_taken_round_by_round() -> None:
    found = ratio_quartiles([2.0, 20.0, 300.0], [1.0, 10.0, 100.0])
    assert found == {"ratio": 2.0, "ratio_q1": 2.0, "ratio_q3": 2.5}


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0, 2.0]), ([], [])])
def test_ratios_need_equally_many_rounds(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match=f"{len(a)} rounds of the one and {len(b)}"):
        ratio_quartiles(a, b)


def test_quartiles_are_shown_in_their_order() -> None:
    assert show_quartiles(ratio_quartiles([1, 2, 3], [2, 2, 2])) == "0.75, 1.00, 1.25"


def test_a_table_aligns_its_numbers_right() -> None:
    rows = [{"server": "ours", "images/s": 12.3456}, {"server": "bare", "images/s": 1234.5}]
    assert markdown_table(rows).splitlines() == [
        "| server | images/s |",
        "| --- | ---: |",
        "| ours | 12.3 |",
        "| bare | 1234 |",
    ]


def test_a_table_refuses_rows_of_other_columns_and_none() -> None:
    with pytest.raises(ValueError, match=r"\['b'\], the first has \['a'\]"):
        markdown_table([{"a": 1}, {"b": 2}])
    with pytest.raises(ValueError, match="no rows"):
        markdown_table([])


def test_a_report_begins_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["ignored", "--out", "a file"])
    write_report(tmp_path / "a.json", this_command("benchmarks.bare"), {"rows": [1]})
    report = json.loads((tmp_path / "a.json").read_text())
    assert report == {"command": "python -m benchmarks.bare --out 'a file'", "rows": [1]}


def test_a_command_names_no_path_that_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["ignored", "--python", "/some where/python", "--rounds", "2"])
    command = this_command("benchmarks.pipeline", {"/some where/python": "$MMDET_PYTHON"})
    assert command == "python -m benchmarks.pipeline --python $MMDET_PYTHON --rounds 2"
