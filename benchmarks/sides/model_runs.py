"""A side that runs a network once for each line; mmdetection's interpreter imports it too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.rounds import answer_lines, time_once


def answer_runs(run: Callable[[], Any], rank: Callable[[Any], tuple[Any, ...]], file: Path) -> None:
    """For each line, runs once and answers its cost.

    Args:
        run: What is timed.
        rank: Makes scores, labels and masks of its result; not timed.
        file: Gets those of the first run.
    """
    results: list[Any] = []

    def answer(line: str) -> dict[str, float]:
        results.clear()
        costs = time_once(lambda: results.append(run()))
        if not file.exists():
            names = ("scores", "labels", "mask_probs")
            np.savez(file, **dict(zip(names, rank(results[0]), strict=True)))
        return costs

    answer_lines(answer)
