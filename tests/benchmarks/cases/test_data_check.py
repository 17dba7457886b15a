from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cases.data_check import check, generate
from benchmarks.harness import BenchmarkError
from training.data.coco import CocoDataset


def test_the_command_is_measured_twice(
    run_case: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    report = run_case("data_check", "--images", "5", "--objects", "40")
    assert [row[""] for row in report["rows"]] == ["first", "again"]
    for row in report["rows"]:
        assert row["wall s"] > 0 and row["CPU s"] > 0 and row["peak memory, MiB"] > 10
    assert "| again |" in capsys.readouterr().out


def test_what_is_generated_can_be_used_as_a_whole(tmp_path: Path) -> None:
    size = generate(tmp_path / "data", 7, 100, 0)
    data = CocoDataset(tmp_path / "data", "train")
    assert size > 1000 and len(data) == 7 and len(data.classes) == 80
    assert sum(len(record.objects) for record in data.records) == 100
    (tmp_path / "data" / "images" / f"{3:012}.jpg").unlink()
    with pytest.raises(BenchmarkError, match="training refuses it"):
        check(tmp_path / "data", tmp_path)
