"""AOTInductor against ONNX Runtime on the CPU: the network of the bundled model, in turns.

    python -m benchmarks.aoti_cpu --out benchmarks/results/aoti_cpu.json

Both get the same canvases. The package is compiled from random weights, which the time does not
depend on. Times are CPU seconds of the process, which other work on the machine hardly changes;
with one thread that is the time on an idle core.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from benchmarks.report import this_command
from export.to_aoti import AotiOptions, build_aoti
from service.engines.aotinductor import load_runner
from training.configs import get_config
from training.model.solo import Solo

MODEL = Path("model_repo/nuclei/2/model.onnx")
BATCHES = (1, 4)


def compile_package(file: Path) -> bytes:
    """The package of `file`, compiled first if it is not there."""
    if not file.exists():
        config = get_config("nuclei")
        network = Solo(config.model, config.num_classes).eval()
        file.write_bytes(build_aoti(network, config, AotiOptions(max_batch=max(BATCHES))))
    return file.read_bytes()


def measure(package: bytes, batch: int, rounds: int) -> dict[str, object]:
    """CPU milliseconds of both, and quartiles of ONNX Runtime's time over the package's."""
    height, width = 288, 288
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, height, width, 3), np.uint8)
    valid_hw = np.full((batch, 2), height, np.int64)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(MODEL), options, providers=["CPUExecutionProvider"])
    runner = load_runner(package, "cpu")
    inputs = [torch.from_numpy(images), torch.from_numpy(valid_hw)]
    steps: dict[str, Callable[[], object]] = {
        "onnxruntime": lambda: session.run(None, {"images": images, "valid_hw": valid_hw}),
        "aotinductor": lambda: runner(inputs),
    }
    laps: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            began_s = time.process_time()
            step()
            laps[name].append(time.process_time() - began_s)
    seconds = {name: np.array(values[1:]) for name, values in laps.items()}  # the first warms up
    ratios = seconds["onnxruntime"] / seconds["aotinductor"]
    return {
        "batch": batch,
        "cpu_ms": {name: round(1e3 * float(np.median(v)), 1) for name, v in seconds.items()},
        "onnxruntime_over_aotinductor_quartiles": np.quantile(ratios, [0.25, 0.5, 0.75])
        .round(3)
        .tolist(),
    }


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aoti_cpu", description=__doc__)
    parser.add_argument("--package", type=Path, default=Path("nuclei.cpu.fp32.pt2"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    package = compile_package(options.package)
    rows = [measure(package, batch, options.rounds) for batch in BATCHES]
    report = {
        "command": this_command("benchmarks.aoti_cpu"),
        "threads": 1,
        "versions": {"torch": torch.__version__, "onnxruntime": ort.__version__},
        "rows": rows,
    }
    print(json.dumps(report, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
