"""Our sides in `benchmarks model`: python -m benchmarks.sides.model_ours SIDE FILE."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.ours import open_session
from benchmarks.sides.model_runs import answer_runs
from pipeline.postprocess import TileCandidates
from pipeline.types import Candidates, Tile, Window
from service.engines.base import BackendOptions
from service.engines.openvino import build_openvino_backend

EAGER = "eager"
GRAPHS = {"graph": "model.onnx", "exits": "model.exits.onnx"}
"""Sides that run a graph in ONNX Runtime, and its file beside the inputs."""
OPENVINO = "openvino"
"""The side that runs the graph with early exits as the engine `openvino` does."""


def main(side: str, file: Path) -> None:
    """Entry point."""
    content = torch.load(file, weights_only=False)  # written by the benchmark just now
    torch.set_num_threads(content["threads"])
    images, valid_hw = content["images"], content["valid_hw"]
    out = file.with_name(f"{side}.npz")
    if side == EAGER:
        network = content["network"]

        def run_eager() -> Any:
            with torch.inference_mode():
                return network.candidates(images, valid_hw)

        answer_runs(run_eager, lambda outputs: tuple(output.numpy() for output in outputs), out)
        return
    if side == OPENVINO:
        options = BackendOptions(
            device="cpu", threads=content["threads"], precision="bf16", slots=1
        )
        backend = build_openvino_backend(file.with_name(GRAPHS["exits"]), options)
        height, width = valid_hw[0].tolist()
        tile = Tile(images[0].numpy(), (height, width), Window(0, 0, height, width))

        def as_batch(found: list[TileCandidates]) -> tuple[Any, ...]:
            (candidates,) = found
            assert isinstance(candidates, Candidates)
            arrays = (candidates.scores, candidates.labels, candidates.mask_probs)
            return tuple(array[None] for array in arrays)

        answer_runs(lambda: backend.infer([tile]), as_batch, out)
        return
    session = open_session(file.with_name(GRAPHS[side]), content["threads"])
    feeds = {"images": images.numpy(), "valid_hw": valid_hw.numpy()}
    names = ["scores", "labels", "mask_probs"]
    answer_runs(lambda: session.run(names, feeds), tuple, out)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
