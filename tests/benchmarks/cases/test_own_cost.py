from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.cases.own_cost import BARE


def test_the_command_measures_trees_beside_the_bare_loop(
    run_case: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--trees first=. second=. --rounds 1 --requests 8 --clients 2 --bare-s 0.1"
    report = run_case("own_cost", *flags.split())
    assert set(report["cpu_ms"]) == set(report["commits"]) | {BARE} == {"first", "second", BARE}
    assert all(len(values) == 1 and values[0] >= 0 for values in report["cpu_ms"].values())
    assert "| second |" in capsys.readouterr().out
