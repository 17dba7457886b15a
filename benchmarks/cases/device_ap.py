"""AP of the bundled model on the GPU beside the CPU's: equal within --tolerance.

On the GPU the graph runs in half precision without a compiler, with the service's slots and the
CUDA kernels. NOT RUN ON HARDWARE.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch

from benchmarks.gpu.engines import Device, EngineRecipe, serve_eager
from benchmarks.harness import BenchmarkError
from benchmarks.harness.report import ROOT, Report, Row
from benchmarks.inputs import NUCLEI
from benchmarks.ours import LoadedModel, load_model
from pipeline.decode import decode_image
from service.engines.aoti_package import PackagePrecision
from training.coco_metrics import mask_ap
from training.data.coco import CocoDataset
from training.predictors import EVALUATION_THRESHOLD, Result, predict, to_results
from training.weights.formats import load_model as load_checkpoint

DATA = ROOT / "tests" / "data" / "nuclei"


def device_ap(
    *,
    data: Annotated[Path, "folder of labelled images with a split val"] = DATA,
    device: Annotated[Device, "that is compared"] = "cuda",
    precisions: Annotated[tuple[PackagePrecision, ...], "on it"] = ("bf16", "fp16"),
    max_dets: Annotated[int, "instances of an image"] = 500,
    tolerance: Annotated[float, "of the AP"] = 0.002,
) -> Report:
    if device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError(f"torch {torch.__version__} finds no CUDA device")
    loaded = load_model(NUCLEI, None)
    split = CocoDataset(data, "val")
    rows: list[Row] = [{"engine": "onnxruntime cpu fp32", **measure(loaded, split, max_dets)}]
    checkpoint = NUCLEI / str(loaded.config.version) / "weights.pt"
    config, network = load_checkpoint(checkpoint)
    for precision in precisions:
        recipe = EngineRecipe(device=device, precision=precision)
        backend = serve_eager(network, config, loaded.config, recipe)
        try:
            row = measure(replace(loaded, backend=backend), split, max_dets)
        finally:
            backend.close()
        rows.append({"engine": f"eager {backend.device} {precision}", **row})
    failures = [
        f"{row['engine']}: AP {row['AP']}, on the CPU {rows[0]['AP']}"
        for row in rows
        if abs(row["AP"] - rows[0]["AP"]) > tolerance
    ]
    return Report(data={"rows": rows, "images": len(split)}, tables={"": rows}, failures=failures)


def measure(model: LoadedModel, split: CocoDataset, max_dets: int) -> Row:
    """AP of a model with its engine."""

    def segment(body: bytes) -> list[Result]:
        found = model.segment(
            decode_image(body),
            score_threshold=EVALUATION_THRESHOLD,
            max_instances=max_dets,
        )
        return to_results(found, model.config.classes)

    numbers = mask_ap(split.truth(), predict(split, segment), max_dets=max_dets)
    return {name: round(numbers[name], 4) for name in ("AP", "AP50", "AP75")}
