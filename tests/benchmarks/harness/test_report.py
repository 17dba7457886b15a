from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest

from benchmarks.harness.report import (
    ROOT,
    Report,
    describe_command,
    describe_commit,
    describe_machine,
    markdown_table,
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


def test_a_processor_without_a_name_is_named_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.harness.report.read_cpu", lambda: ("A CPU", "avx2"))
    assert describe_machine()["cpu"] == "A CPU"
    monkeypatch.setattr("benchmarks.harness.report.read_cpu", lambda: ("", ""))
    assert describe_machine()["cpu"] == platform.machine()


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


def test_a_report_has_command_commit_machine_and_numbers(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.json"
    report = Report(data={"rows": [1]}, packages=["pytest"])
    write_report(file, report, ["python -m benchmarks", "bare", "--out", "a file"])
    content = json.loads(file.read_text())
    assert list(content) == ["command", "commit", "machine", "rows"]
    assert content["command"] == "python -m benchmarks bare --out 'a file'"
    assert content["machine"]["versions"]["pytest"] == pytest.__version__


def test_a_command_names_no_absolute_path() -> None:
    words = ["python -m benchmarks", "model", "--mmdet-python", "/some where/python", "--rounds"]
    assert describe_command([*words, "2"]) == (
        "python -m benchmarks model --mmdet-python $MMDET_PYTHON --rounds 2"
    )


def test_the_commit_is_that_of_the_checkout(tmp_path: Path) -> None:
    assert describe_commit(tmp_path) is None
    commit = describe_commit(ROOT)
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    assert commit is not None and len(commit.removesuffix("-dirty")) >= 12


def test_a_report_shows_titles_tables_and_notes() -> None:
    report = Report(data={}, tables={"": [{"a": 1}], "more": [{"b": 2}]}, notes=["a note"])
    assert report.render().split("\n\n") == [
        "| a |\n| ---: |\n| 1 |",
        "more:",
        "| b |\n| ---: |\n| 2 |",
        "a note",
    ]
