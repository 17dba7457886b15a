"""Timing for benchmarks/gpu.py, and what the hardware can do at most."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Step = Callable[[], Any]


def synchronise(device: str) -> None:
    """Waits for the device, so that a clock on the host sees its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def time_ms(step: Step, device: str, *, seconds: float, most: int = 200) -> dict[str, float]:
    """Milliseconds of a step: median and quartiles of calls in turn, after one that warms up."""
    step()
    synchronise(device)
    laps: list[float] = []
    end_s = time.perf_counter() + seconds
    while len(laps) < 3 or (len(laps) < most and time.perf_counter() < end_s):
        began_s = time.perf_counter()
        step()
        synchronise(device)
        laps.append(1e3 * (time.perf_counter() - began_s))
    low, median, high = np.quantile(laps, [0.25, 0.5, 0.75]).round(6).tolist()
    return {"median": median, "q25": low, "q75": high, "calls": len(laps)}


def measure_ceilings(device: str, *, quick: bool) -> dict[str, float]:
    """Copies from the host and on the device, GB/s, and matrix products, TFLOP/s."""
    n_bytes = (1 << 20) if quick else (1 << 28)
    side = 256 if quick else 8192
    host = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=device == "cuda")
    here = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    there = torch.empty_like(here)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))

    def rate(amount: float, step: Step) -> float:
        best_s = 1e-3 * time_ms(step, device, seconds=1.0)["q25"]
        return float(f"{amount / best_s:.4g}")

    return {
        "copy_h2d_gb_s": rate(n_bytes / 1e9, lambda: here.copy_(host, non_blocking=True)),
        # Read and written: twice the bytes.
        "copy_d2d_gb_s": rate(2 * n_bytes / 1e9, lambda: there.copy_(here)),
        "bf16_matrix_tflop_s": rate(2 * side**3 / 1e12, lambda: torch.mm(a, b)),
    }
