from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.cases.schedule import COCO_IMAGES, estimate


def test_an_estimate_says_what_bounds_it(
    run_case: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--models", "solo_512_r50", "--images", 1, "--shares", 0.5, "--gpus", 8)
    report = run_case("schedule", *flags)
    assert report["images"] == 72 * COCO_IMAGES
    (row,) = report["rows"]
    assert row["GFLOP a step"] == 924 and row["hours"] > 0 and row["loading, CPU ms"] > 0
    assert "ESTIMATE: 6x, 72 epochs, 8 GPUs" in capsys.readouterr().out


def test_the_slower_part_decides() -> None:
    row = estimate(3_600_000, gflop=2000, load_s=0.1, tflop_s=2000, cores=1000)
    assert (row["GPUs, images/s"], row["loading, images/s"]) == (1000, 10_000)
    assert (row["hours"], row["bound by"]) == (1.0, "GPUs")
    row = estimate(3_600_000, gflop=2000, load_s=0.1, tflop_s=2000, cores=10)
    assert (row["hours"], row["bound by"]) == (10.0, "loading")


@pytest.mark.parametrize(
    "flags", [("--name", "9x"), ("--gpus", 0), ("--shares", 0), ("--shares", 1.5)]
)
def test_wrong_numbers_are_refused(
    run_case: Callable[..., Any], capsys: pytest.CaptureFixture[str], flags: tuple[Any, ...]
) -> None:
    run_case("schedule", *flags, status=1)
    assert "expected 1x, 3x, 6x" in (found := capsys.readouterr().err) or "at least 1" in found
