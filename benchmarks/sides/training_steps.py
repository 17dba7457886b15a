"""A side that runs one training step for each line; mmdetection's interpreter imports it too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.memory import read_status, reset_peak
from benchmarks.harness.rounds import answer_lines, time_once

Step = Callable[[], dict[str, Tensor]]
"""Forward, targets, loss, backward -> the losses `category` and `mask`, weighted."""


def answer_steps(step: Step, parameters: dict[str, Tensor], features: list[Tensor]) -> None:
    """For each line, runs a step and answers its cost.

    Args:
        step: The step; accumulates gradients in `parameters` and `features`.
        parameters: By name; the norms of their gradients are reported.
        features: Inputs with gradients, whose norms are reported too.
    """
    leaves = [*parameters.values(), *features]
    losses: dict[str, Tensor] = {}

    def answer(line: str) -> dict[str, Any]:
        for leaf in leaves:
            leaf.grad = None
        reset_peak()
        before = read_status("VmRSS")
        costs = time_once(lambda: losses.update(step()))
        return {
            **costs,
            "peak_bytes": read_status("VmHWM") - before,
            "losses": {name: value.item() for name, value in losses.items()},
            "parameter_grads": {name: _norm(p) for name, p in parameters.items()},
            "feature_grads": [_norm(f) for f in features],
        }

    answer_lines(answer)


def _norm(leaf: Tensor) -> float:
    return 0.0 if leaf.grad is None else torch.linalg.vector_norm(leaf.grad.double()).item()
