"""A process that runs a network once whenever it is told to, and says what that cost.

Imports nothing of the repository: mmdetection's interpreter runs it too.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def serve(run: Callable[[], Any], rank: Callable[[Any], tuple[Any, Any, Any]], file: Path) -> None:
    """For each line of standard input, runs once and prints its cost as a line of JSON.

    Args:
        run: What is measured.
        rank: Makes scores, labels and masks of its result; not measured.
        file: Gets those of the first run.
    """
    for count, _ in enumerate(sys.stdin):
        wall, cpu = time.perf_counter(), time.process_time()
        result = run()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if count == 0:
            np.savez(
                file, **dict(zip(("scores", "labels", "mask_probs"), rank(result), strict=True))
            )
        print(json.dumps({"wall_s": wall, "cpu_s": cpu}), flush=True)
