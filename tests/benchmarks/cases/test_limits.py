"""`fairness`, `jobs` and `memory`: their plumbing on small inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cases import memory
from benchmarks.ours import canvases_of
from tests.support.blob_model import publish


def test_a_small_client_is_measured_alone_and_beside_a_large_one(
    run_case: Callable[..., Any], tmp_path: Path
) -> None:
    model = publish(tmp_path / "repo")
    flags = "--canvases 200 --side 200 --seconds 0.5 --settle-s 0.3"
    report = run_case("fairness", "--model", model, *flags.split())
    assert report["canvases_of_an_image"] == canvases_of(model, (200, 200)) > 4
    assert abs(report["canvases_in_flight"] - 200) <= report["canvases_of_an_image"] / 2
    assert report["heavy_answers"] > 0
    assert [row[""] for row in report["rows"]] == ["alone", "during"]
    assert all(row["answers"] > 0 and row["p99, ms"] > 0 for row in report["rows"])
    assert set(report["ratios"]) == {"p50 during / alone", "p99 during / alone"}


def test_memory_is_measured_beyond_the_pixels(
    run_case: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"line": (1, 2000), "square": (300, 300), "photo": (200, 300)}
    monkeypatch.setattr(memory, "SIZES_HW", sizes)
    rows = run_case("memory", "--rounds", 1, "--cases", "line", "photo")["rows"]
    assert [row["image"] for row in rows] == ["line, 1x2000", "photo, 200x300"]
    for row in rows:
        assert row["baseline, MB"] > 30
        assert row["beyond the pixels, MB"] == pytest.approx(row["added, MB"] - row["pixels, MB"])
        assert row["canvases"] > 1


def test_a_small_client_is_measured_alone_and_beside_a_job(
    run_case: Callable[..., Any], tmp_path: Path
) -> None:
    model = publish(tmp_path / "repo")
    flags = "--files 4000 --seconds 1 --flags jobs-in-flight=1"
    report = run_case("jobs", "--model", model, *flags.split())
    assert [row[""] for row in report["rows"]] == ["alone", "during"]
    assert all(row["answers"] > 0 and row["p99, ms"] > 0 for row in report["rows"])
    assert all(row["job, files/s"] > 0 for row in report["rows"])
    assert set(report["ratios"]) == {"p50 during / alone", "p99 during / alone"}
