"""The comparison of two checkouts, on this one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.cases import before_after
from benchmarks.harness.report import ROOT
from benchmarks.harness.rounds import Samples


def test_both_checkouts_are_asked_at_one_rate(
    run_case: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--workloads light --workers 1 --clients 2 --rounds 1 --seconds 0.5"
    report = run_case("before_after", "--before", ROOT, *flags.split())
    assert report["commits"]["before"] == report["commits"]["after"]
    (found,) = report["found"].values()
    assert found["differing_answers"] == []
    rates = [found["values"][side]["per_second"] for side in ("before", "after")]
    assert rates[0] == rates[1]
    slower = min(found["values"][side]["images_per_s"][0] for side in ("before", "after"))
    assert rates[0] == [pytest.approx(0.7 * slower)]
    assert [row["number"] for row in report["rows"]] == list(before_after.SHOWN)
    assert "| light, 1 worker | CPU ms per image |" in capsys.readouterr().out


def test_ratios_are_after_over_before() -> None:
    values = {name: [2.0, 4.0] for name in before_after.SHOWN.values()}
    twice = {name: [4.0, 4.0] for name in values}
    row = before_after.build_rows(Samples({"before": values, "after": twice}))[0]
    assert list(row.values()) == ["images/s", 3, 4, "1.5 (1-2)"]
