"""Loads and faults on the real server. What they measure is listed at the end of the run."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Report = Callable[[str, float | str], None]


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Report:
    """Takes a measured number, with its unit in the name."""

    def take(name: str, value: float | str) -> None:
        record_property(name, f"{value:.4g}" if isinstance(value, float) else value)

    return take


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = [
        f"{found.nodeid.rpartition('/')[2]}: {name} = {value}"
        for outcome in ("passed", "failed")
        for found in terminalreporter.getreports(outcome)
        if "tests/reliability/" in found.nodeid
        for name, value in found.user_properties
    ]
    if rows:
        terminalreporter.section("measured")
        for row in rows:
            terminalreporter.line(row)
