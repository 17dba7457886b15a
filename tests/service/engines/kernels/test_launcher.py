"""Launching through the real cuda-core, on a driver that is made for the tests."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness.cli import main as run_benchmark
from service.engines.base import BackendError
from service.engines.device import CudaDevice, CudaError
from service.engines.kernels.launcher import (
    ARGUMENTS,
    BLOCK,
    SIGNATURES,
    grid_of,
    typed_arguments,
)
from service.engines.kernels.nvrtc import (
    SOURCES,
    cache_path,
    compiler_version,
    describe,
    write_cubin,
)
from tests.support.kernel_host import COMPILER, SUPPORT

ROOT = Path(__file__).resolve().parents[4]


def test_the_grid_covers_the_threads() -> None:
    assert grid_of((1, 1, 1)) == (1, 1, 1)
    assert grid_of((BLOCK, 7, 3)) == (1, 7, 3)
    assert grid_of((BLOCK + 1, 65535, 65535)) == (2, 65535, 65535)


@pytest.mark.parametrize("threads", [(0, 1, 1), (1, 0, 1), (1, 65536, 1), (1, 1, 65536)])
def test_a_grid_that_cuda_cannot_run_is_refused(threads: tuple[int, int, int]) -> None:
    with pytest.raises(BackendError, match=re.escape(str(threads))):
        grid_of(threads)


def test_arguments_get_the_types_that_the_kernel_declares() -> None:
    typed = typed_arguments("matrix_compensate", (1 << 63, 16, -3))
    assert [type(argument) for argument in typed] == [ARGUMENTS[letter] for letter in "ppi"]
    assert [argument.value for argument in typed] == [1 << 63, 16, -3]


def test_a_wrong_number_of_arguments_is_refused() -> None:
    with pytest.raises(BackendError, match="matrix_compensate takes 3 arguments, not 2"):
        typed_arguments("matrix_compensate", (1, 2))


def test_every_kernel_has_types() -> None:
    for source, letters in SIGNATURES.values():
        assert source in SOURCES
        assert set(letters) <= set(ARGUMENTS)


@pytest.fixture
def driver_environment(kernel_library: Path, tmp_path: Path) -> dict[str, str]:
    """Of a process in which cuda-core finds a GPU of the tests' own."""
    pytest.importorskip("cuda.core", reason="the extra gpu-kernels is not installed")
    library = tmp_path / "libcuda.so.1"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-std=c++17", "-shared", "-fPIC"]
    source = str(SUPPORT / "fake_driver.cpp")
    subprocess.run([COMPILER, *flags, source, "-o", str(library), "-ldl"], check=True)
    cache = tmp_path / "cache"
    for name in SOURCES:  # the driver looks into no cubin
        recipe = describe(name, "sm_90", compiler_version())
        write_cubin(cache_path(cache / "solo-serve" / "kernels", recipe), recipe, b"\x7fELF")
    return {
        **os.environ,
        "FAKE_DRIVER_KERNELS": str(kernel_library),
        "LD_LIBRARY_PATH": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(cache),
    }


@pytest.mark.slow
def test_what_runs_on_a_gpu_runs_through_cuda_core(driver_environment: dict[str, str]) -> None:
    """The cases of a GPU, each argument and copy by cuda-core's own code."""
    tests = ["tests/service/engines/kernels", "tests/service/engines/test_device.py"]
    chosen = "gpu and not bundled and not without_a_gpu"
    command = [sys.executable, "-m", "pytest", "-q", "-k", chosen, "-m", "not slow", *tests]
    command += ["-p", "no:cacheprovider"]
    done = subprocess.run(
        command, cwd=ROOT, env=driver_environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|skipped)", done.stdout)}
    assert counts["passed"] > 80, done.stdout[-2000:]
    assert "skipped" not in counts


@pytest.mark.slow
def test_the_benchmark_runs_through_cuda_core(
    driver_environment: dict[str, str], tmp_path: Path
) -> None:
    """That it runs, to its end: there is nothing to measure here."""
    out = tmp_path / "kernels.json"
    command = [sys.executable, "-m", "benchmarks", "kernels", "--repeats", "1", "--batches", "1"]
    done = subprocess.run(
        [*command, "--copy-bytes", "1000000", "--out", str(out)],
        cwd=ROOT,
        env=driver_environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_bytes())
    assert [case["mask_type"] for case in result["cases"]] == ["float32", "float16", "bfloat16"]
    for case in result["cases"]:
        assert 50 < case["instances"] <= 100
        assert case["kernels_ms"].keys() > case["floors_ms"].keys()


def test_without_a_gpu_the_device_and_the_benchmark_say_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("cuda.core", reason="the extra gpu-kernels is not installed")
    try:
        CudaDevice()
    except CudaError as error:
        assert "CUDA cannot use device 0" in str(error)
    else:
        pytest.skip("there is a GPU")
    assert run_benchmark(["kernels", "--out", "-"]) == 1
    assert "nothing to measure: CUDA cannot use device 0" in capsys.readouterr().err
