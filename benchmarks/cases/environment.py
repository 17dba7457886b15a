"""The GPU, its driver and libraries, its measured ceilings, and whether post-processing runs on it.

Packages that `benchmarks lease` needs and that are missing are named.

`--device cpu` does the same on the CPU with small inputs, to check that all of it works.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import Annotated, Any, Literal

import torch

from benchmarks.gpu.stages import measure_limits
from benchmarks.harness import BenchmarkError
from benchmarks.harness.report import Report
from benchmarks.requirements import find_missing
from pipeline.model_config import MatrixNms, PostprocessSpec
from service.engines.base import BackendError
from service.engines.device import CudaDevice
from service.engines.kernels.postprocessor import load_select

PACKAGES = ("torch", "triton", "onnxruntime-gpu", "tensorrt", "cuda-core", "pytest")
QUERY = "name,driver_version,memory.total,mig.mode.current,clocks.max.sm,power.limit"


def environment(
    *, device: Annotated[Literal["cuda", "cpu"], "what is measured"] = "cuda"
) -> Report:
    if device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError(f"torch {torch.__version__} finds no CUDA device")
    about: dict[str, Any] = {"cuda": torch.version.cuda, "nvidia_smi": ask_driver()}
    missing = find_missing()
    failures = [f"packages are missing: {', '.join(missing)}"] if missing else []
    if device == "cuda":
        about["device"] = torch.cuda.get_device_name()
        about["compute_capability"] = torch.cuda.get_device_capability()
        about["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        about["post_processing"] = find_postprocessing()
        if about["post_processing"] != "on the device":
            failures.append(f"post-processing is {about['post_processing']}")
    ceilings = measure_limits(device, quick=device == "cpu")
    return Report(
        data={"gpu": about, "missing": missing, "ceilings": ceilings},
        tables={"ceilings": [ceilings]},
        notes=[str(about)],
        packages=PACKAGES,
        failures=failures,
    )


def ask_driver() -> str | None:
    """What nvidia-smi says of each GPU, a line each; None without it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={QUERY}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return (done.stdout or done.stderr).strip()


def find_postprocessing() -> str:
    """`on the device`, or why it is not."""
    spec = PostprocessSpec(nms=MatrixNms(), update_threshold=0, score_threshold=0)
    try:
        found = load_select(CudaDevice(), spec, 4)
    except BackendError as error:
        return str(error)
    return found if isinstance(found, str) else "on the device"
