"""A process that runs one training step whenever it is told to, and says what the step cost.

`benchmarks.training` starts one for each side, so that neither warms the other's caches nor
fills its memory. Runs in mmdetection's interpreter too.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.memory import forget_peak, peak_bytes, resident_bytes

Step = Callable[[], dict[str, Tensor]]
"""Forward, targets, loss, backward -> the losses `category` and `mask`, weighted."""


def serve(step: Step, parameters: dict[str, Tensor], features: list[Tensor]) -> None:
    """For each line of standard input, runs a step and prints its cost as a line of JSON.

    Args:
        step: The step; accumulates gradients in `parameters` and `features`.
        parameters: By name; the norms of their gradients are reported.
        features: Inputs with gradients, whose norms are reported too.
    """
    leaves = [*parameters.values(), *features]
    for _ in sys.stdin:
        for leaf in leaves:
            leaf.grad = None
        forget_peak()
        before = resident_bytes()
        wall, cpu = time.perf_counter(), time.process_time()
        losses = step()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        report = {
            "wall_s": wall,
            "cpu_s": cpu,
            "peak_bytes": peak_bytes() - before,
            "losses": {name: value.item() for name, value in losses.items()},
            "parameter_grads": {name: _norm(p) for name, p in parameters.items()},
            "feature_grads": [_norm(f) for f in features],
        }
        print(json.dumps(report), flush=True)


def _norm(leaf: Tensor) -> float:
    return 0.0 if leaf.grad is None else torch.linalg.vector_norm(leaf.grad.double()).item()
