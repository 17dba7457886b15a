"""Our sides in `benchmarks.model`: python -m benchmarks.model_ours SIDE FILE."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch

from benchmarks.model_serve import serve

GRAPHS = {"graph": "model.onnx", "exits": "model.exits.onnx"}
"""Sides that run a graph, and its file beside the inputs; the other side is `eager`."""


def main(side: str, file: Path) -> None:
    """Entry point."""
    content = torch.load(file, weights_only=False)  # written by benchmarks.model just now
    torch.set_num_threads(content["threads"])
    images, valid_hw = content["images"], content["valid_hw"]
    out = file.with_name(f"{side}.npz")
    if side == "eager":
        network = content["network"]

        def run_eager() -> Any:
            with torch.inference_mode():
                return network.candidates(images, valid_hw)

        serve(run_eager, lambda outputs: tuple(output.numpy() for output in outputs), out)
        return
    options = ort.SessionOptions()
    options.intra_op_num_threads = content["threads"]
    options.log_severity_level = 3
    graph = str(file.with_name(GRAPHS[side]))
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    feeds = {"images": images.numpy(), "valid_hw": valid_hw.numpy()}
    names = ["scores", "labels", "mask_probs"]
    serve(lambda: session.run(names, feeds), lambda outputs: tuple(outputs), out)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
