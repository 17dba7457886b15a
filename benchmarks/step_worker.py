"""A process that runs one training step whenever it is told to, and says what the step cost.

`benchmarks.training` starts one for each side, so that neither warms the other's caches nor
fills its memory. Imports nothing of the repository: mmdetection's interpreter runs it too.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Step = Callable[[], dict[str, Tensor]]
"""Forward, targets, loss, backward -> the losses `category` and `mask`, weighted."""


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _forget_peak() -> None:
    """Sets the peak of the resident set back to its present size (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM; peak memory is measured on Linux only")


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
        _forget_peak()
        before = _resident_bytes()
        wall, cpu = time.perf_counter(), time.process_time()
        losses = step()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        report = {
            "wall_s": wall,
            "cpu_s": cpu,
            "peak_bytes": _peak_bytes() - before,
            "losses": {name: value.item() for name, value in losses.items()},
            "parameter_grads": {name: _norm(p) for name, p in parameters.items()},
            "feature_grads": [_norm(f) for f in features],
        }
        print(json.dumps(report), flush=True)


def _norm(leaf: Tensor) -> float:
    return 0.0 if leaf.grad is None else torch.linalg.vector_norm(leaf.grad.double()).item()
