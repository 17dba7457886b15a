"""The parity tests again with AVX2, with which PyTorch rounds differently than with AVX-512."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
RUN = """
import sys, pytest, torch
assert torch.backends.cpu.get_cpu_capability() == "AVX2"
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[1:]]))
"""


def test_the_same_with_avx2() -> None:
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("the CPU has no AVX-512: the other tests have already run without it")
    files = [HERE / "test_model.py", HERE / "test_learning.py"]
    run = subprocess.run(
        [sys.executable, "-c", RUN, *files],
        cwd=HERE.parents[2],
        env={**os.environ, **AVX2},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
