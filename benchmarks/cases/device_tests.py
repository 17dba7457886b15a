"""The tests of the CUDA kernels on the GPU; none may be skipped. `--device cpu`: on the host.

The kernels' memory is filled with 0xFF before each case. With --sanitizer a few cases run under
compute-sanitizer's memcheck.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from typing import Annotated, Literal

from benchmarks.harness import BenchmarkError
from benchmarks.harness.report import ROOT, Report

TESTS = ("tests/service/engines/kernels", "tests/service/engines/test_device.py")
CHOSEN = {"cuda": "gpu and not bundled and not without_a_gpu", "cpu": "host and not bundled"}
FEW = "(full_mask_is_one_run or identical_masks or empty_slots)"
SANITIZER = "compute-sanitizer"
FOUND = 99


def device_tests(
    *,
    device: Annotated[Literal["cuda", "cpu"], "where the kernels run"] = "cuda",
    sanitizer: Annotated[bool, "under compute-sanitizer"] = False,
    few: Annotated[bool, "a few cases"] = False,
) -> Report:
    prefix: list[str] = []
    if sanitizer:
        program = shutil.which(SANITIZER)
        if program is None:
            raise BenchmarkError(f"there is no {SANITIZER} in PATH")
        prefix = [program, "--tool", "memcheck", "--error-exitcode", str(FOUND)]
    chosen = f"{CHOSEN[device]} and {FEW}" if few or sanitizer else CHOSEN[device]
    command = [*prefix, sys.executable, "-m", "pytest", "-q", "-k", chosen, "-m", "not slow"]
    command += ["-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    counts = count_results(done.stdout)
    failures = []
    if done.returncode or not counts.get("passed") or counts.get("skipped"):
        print(done.stdout[-8000:], done.stderr[-2000:])
        failures.append(f"exit status {done.returncode}, {counts}")
    return Report(
        data={"device": device, "chosen": chosen, "sanitizer": sanitizer, **counts},
        notes=[f"{chosen}: {counts}"],
        packages=("pytest", "cuda-core"),
        failures=failures,
    )


def count_results(output: str) -> dict[str, int]:
    """How many tests passed, failed and so on, from pytest's last line."""
    last = (output.strip().splitlines() or [""])[-1]
    words = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", last)
    return {word: int(number) for number, word in words}
