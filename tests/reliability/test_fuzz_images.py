"""Damaged images: the decoder says so, soon and with little memory; see `fuzz_images`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.reliability.conftest import Report
from tests.reliability.fuzz_images import build_cases
from tests.support.server import ROOT


def run(count: int, report: Report) -> None:
    command = [sys.executable, "-m", "tests.reliability.fuzz_images", "--count", str(count)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    for name, value in found.items():
        report(name, value)
    slowest_ms = found.pop("slowest_ms")
    assert sum(found.values()) == count
    assert found["decoded"] > count / 20 and found["corrupt_image"] > count / 20
    assert slowest_ms < 4000  # four steps of less than 1 s each


def test_a_thousand_damaged_files(report: Report) -> None:
    run(1000, report)


@pytest.mark.slow
def test_twenty_thousand_damaged_files(report: Report) -> None:
    run(20_000, report)


def test_a_file_comes_again_by_its_number() -> None:
    (again,) = build_cases(7, 1)
    assert again == list(build_cases(5, 4))[2]
