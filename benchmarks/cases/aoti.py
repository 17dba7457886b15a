"""AOTInductor beside ONNX Runtime on the CPU: the network of the bundled model, one thread.

Both get the same canvases. The package is compiled from random weights, on which the time does not
depend; compiling takes minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from benchmarks.harness.report import Report
from benchmarks.harness.rounds import Samples, take_turns, timed
from benchmarks.inputs import NUCLEI
from benchmarks.ours import ONNX_FILE, open_session, read_model
from export.to_aoti import AotiOptions, build_aoti
from service.engines.aotinductor import load_runner
from training.configs import get_config
from training.model.solo import Solo

ORT, AOTI = "onnxruntime", "aotinductor"


def aoti(
    *,
    package: Annotated[Path, "compiled if it is missing"] = Path("nuclei.cpu.fp32.pt2"),
    batches: Annotated[tuple[int, ...], "canvases in a call"] = (1, 4),
    rounds: Annotated[int, "that count"] = 15,
) -> Report:
    torch.set_num_threads(1)
    runner = load_runner(compile_package(package, max(batches)), "cpu")
    found = {batch: measure(runner, batch, rounds) for batch in batches}
    rows = [
        {
            "batch": batch,
            **{f"{side}, CPU ms": 1e3 * samples.median(side, "cpu_s") for side in (ORT, AOTI)},
            "onnxruntime / aotinductor (range)": str(samples.ratio(ORT, AOTI, "cpu_s")),
        }
        for batch, samples in found.items()
    ]
    data = {"threads": 1, "rows": rows, "seconds": {n: s.values for n, s in found.items()}}
    return Report(data=data, tables={"": rows}, packages=("torch",))


def compile_package(file: Path, max_batch: int) -> bytes:
    """The package of `file`, compiled first if it is not there."""
    if not file.exists():
        config = get_config("nuclei")
        network = Solo(config.model, config.num_classes).eval()
        file.write_bytes(build_aoti(network, config, AotiOptions(max_batch=max_batch)))
    return file.read_bytes()


def measure(runner: Callable[[Sequence[torch.Tensor]], object], batch: int, rounds: int) -> Samples:
    """Both on the same random canvases of 288x288 px."""
    images = np.random.default_rng(0).integers(0, 256, (batch, 288, 288, 3), np.uint8)
    feeds = {"images": images, "valid_hw": np.full((batch, 2), 288, np.int64)}
    _, folder = read_model(NUCLEI)
    session = open_session(folder / ONNX_FILE, 1)
    inputs = [torch.from_numpy(array) for array in feeds.values()]
    variants = {
        ORT: timed(lambda: session.run(None, feeds)),
        AOTI: timed(lambda: runner(inputs)),
    }
    return take_turns(variants, rounds)
