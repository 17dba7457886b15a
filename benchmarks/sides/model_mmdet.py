"""The side of mmdetection 3.3 in `benchmarks model`; runs in mmdetection's interpreter.

    python -m benchmarks.sides.model_mmdet keys FILE      writes the names of its weights
    python -m benchmarks.sides.model_mmdet steps FILE     answers runs on the inputs in FILE

A run is backbone, neck and head in evaluation mode, which gives all masks of every level at the
finest stride, and category scores after points NMS. Its normalisation, selection and Matrix NMS
are not part of it.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.sides.model_runs import answer_runs
from benchmarks.sides.training_mmdet import head_config, import_mmdetection

RESNET_50 = {
    "type": "ResNet",
    "depth": 50,
    "num_stages": 4,
    "out_indices": (0, 1, 2, 3),
    "style": "pytorch",
}
FPN = {
    "type": "FPN",
    "in_channels": [256, 512, 1024, 2048],
    "out_channels": 256,
    "start_level": 0,
    "num_outs": 5,
}


def build_model(levels: dict[str, Any]) -> Any:
    """mmdetection's SOLO with ResNet-50 in its published configuration."""
    import_mmdetection()
    models = import_module("mmdet.registry").MODELS
    head = head_config("vanilla", levels)
    return models.build({"type": "SOLO", "backbone": RESNET_50, "neck": FPN, "mask_head": head})


def rank(outputs: tuple[list[Tensor], list[Tensor]], options: dict[str, Any]) -> tuple[Any, ...]:
    """The candidates before NMS in the graph's form, of mmdetection's outputs for one image."""
    masks, categories = (list(values) for values in outputs)
    scores = torch.cat([c[0].flatten(1).T for c in categories])  # [cells, C]
    values, index = scores.flatten().topk(options["candidates"])
    cells, labels = index // scores.shape[1], index % scores.shape[1]
    strides = torch.cat(
        [torch.full((m.shape[1],), s) for m, s in zip(masks, options["strides"], strict=True)]
    )
    probs = torch.cat([m[0] for m in masks])[cells]
    inside = probs > options["mask_threshold"]
    area = inside.sum((1, 2))
    maskness = (probs * inside).sum((1, 2)) / area.clamp(min=1) * (area > strides[cells])
    values = values * (values > options["candidate_threshold"]) * maskness
    values, order = values.sort(descending=True)
    return tuple(x.numpy() for x in (values[None], labels[order][None], probs[order][None]))


def main(task: str, file: Path) -> None:
    """Entry point."""
    content = torch.load(file, weights_only=True)
    model = build_model(content["levels"])
    if task == "keys":
        file.with_name("keys.json").write_text(json.dumps(list(model.state_dict())))
        return
    torch.set_num_threads(content["threads"])
    model.load_state_dict(content["weights"])
    model.eval()

    def run() -> Any:
        with torch.inference_mode():
            return model.mask_head(model.extract_feat(content["pixels"]))

    answer_runs(run, lambda outputs: rank(outputs, content), file.with_name("mmdet.npz"))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
