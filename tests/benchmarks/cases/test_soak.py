"""A soak in small: it counts what it sends, and sees when the server counts something else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cases import soak
from benchmarks.load import NO_ANSWER
from tests.support.blob_model import publish
from tests.support.server import CPU_FLAGS, run_server


def test_a_small_soak(tmp_path: Path, run_case: Callable[..., Any]) -> None:
    publish(tmp_path / "repo")
    flags = ("--model-repo", str(tmp_path / "repo"), *CPU_FLAGS)
    with run_server(tmp_path / "log", *flags) as server:
        options = ("--requests", 60, "--rate", 60, "--interval-s", 0.1)
        numbers = run_case("soak", server.url, *options)
        ping = run_case("ping", server.url, "--seconds", 0.3)
    assert numbers["statuses"] == {"200": 60}
    assert numbers["differences"] == []
    assert numbers["rss_mb_at_the_end"] > 10
    assert numbers["command"].startswith("python -m benchmarks soak http://")
    assert ping["count"] > 5 and 0 < ping["p50_ms"] <= ping["max_ms"]


def test_a_counter_that_differs_is_named() -> None:
    before = {"images": 5.0, "status 200": 5.0}
    after = {
        "images": 14.0,
        "images in the histogram": 10.0,
        "requests in the histogram": 12.0,
        "status 200": 15.0,
        "status 422": 1.0,
        "status 503": 1.0,
    }
    sent = Counter({200: 10, 503: 2, NO_ANSWER: 1})
    assert soak.compare(sent, before, after) == [
        "images: 9 counted, 10 sent",
        "status 422: 1 counted, 0 sent",
        "status 503: 1 counted, 2 sent",
    ]


def test_a_slope_is_per_second() -> None:
    samples = [(0.0, 1e9), *((float(t), 1e6 + 250.0 * t) for t in range(1, 21))]
    assert soak.measure_slope(samples) == pytest.approx(250)
