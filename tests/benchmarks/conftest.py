"""Runs a benchmark as the command does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.cli import main

RunCase = Callable[..., Any]


@pytest.fixture
def run_case(tmp_path: Path) -> RunCase:
    """Runs `NAME FLAGS`; returns the JSON that it wrote, once it has exited as expected."""

    def run(name: str, *flags: object, status: int = 0) -> Any:
        out = tmp_path / "results" / f"{name}.json"
        assert main([name, *map(str, flags), "--out", str(out)]) == status
        return json.loads(out.read_bytes()) if out.exists() else None

    return run
