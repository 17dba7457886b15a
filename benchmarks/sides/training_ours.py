"""Our side in `benchmarks training`: head, targets and loss as `training.trainer` runs them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.sides.training_steps import answer_steps
from training.configs.schema import (
    BackboneConfig,
    HeadConfig,
    HeadKind,
    LossConfig,
    NetworkConfig,
    TargetConfig,
)
from training.criterion import solo_loss
from training.model.solo import Solo
from training.targets import Objects, assign_targets
from training.weights.convert import convert_key


def head_config(kind: HeadKind, levels: dict[str, Any]) -> HeadConfig:
    """Our published head; `levels` as mmdetection's configuration names them."""
    return HeadConfig(
        kind=kind,
        num_convs=levels["stacked_convs"],
        num_grids=tuple(levels["num_grids"]),
        level_strides=tuple(levels["strides"]),
        mask_strides=tuple(stride // 2 for stride in levels["strides"]),
        scale_ranges=tuple((low, high) for low, high in levels["scale_ranges"]),
    )


def main(kind: HeadKind, file: Path) -> None:
    """Entry point."""
    content = torch.load(file, weights_only=True)
    torch.set_num_threads(content["threads"])
    config = NetworkConfig(  # the backbone is not run
        backbone=BackboneConfig(depth=18, base_width=8, norm="bn"),
        head=head_config(kind, content["levels"]),
    )
    model = Solo(config, 80)
    weights = {convert_key(f"mask_head.{k}"): v for k, v in content["weights"].items()}
    model.head.load_state_dict({k.removeprefix("head."): v for k, v in weights.items()})
    model.train()
    objects = [
        Objects(o["masks"].numpy(), o["boxes_xyxy"].numpy(), o["labels"].numpy())
        for o in content["objects"]
    ]
    features = [f.requires_grad_() for f in content["features"]]

    def step() -> dict[str, Tensor]:
        height, width = content["canvas_hw"]
        targets = [
            assign_targets(o, (height, width), config.head, TargetConfig(), 80) for o in objects
        ]
        losses = solo_loss(model, model.head(features), targets, LossConfig())
        losses["total"].backward()  # type: ignore[no-untyped-call]
        return {"category": losses["category"], "mask": losses["mask"]}

    answer_steps(step, {f"head.{k}": p for k, p in model.head.named_parameters()}, features)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))  # type: ignore[arg-type]
