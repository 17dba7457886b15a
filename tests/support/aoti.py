"""AOTInductor backends over plain functions: nothing is compiled."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from export.to_aoti import AotiOptions, describe_package
from pipeline.model_config import Canvas, InputSpec, KeepRatioResize, ModelConfig
from pipeline.types import Tile, Window
from service.engines.aoti_package import PackageInfo
from service.engines.aotinductor import Runner, build_host_slot, serve_package
from service.engines.base import BackendOptions
from service.engines.slots import SlotBackend
from tests.support.tiny_solo import tiny_config
from training.model.solo import Solo

CPU = BackendOptions(device="cpu", threads=1)
ANY_CANVAS = InputSpec(resize=KeepRatioResize(short_side=96, long_side=160))
CONFIG = replace(tiny_config(), input=ANY_CANVAS)
INFO = describe_package(CONFIG, AotiOptions(max_batch=3))


def build_tiles(batch: int, height: int, width: int) -> list[Tile]:
    images = np.random.default_rng(1).integers(0, 256, (batch, height, width, 3), np.uint8)
    valid = [(height - 8 * i, width) for i in range(batch)]
    for image, (rows, _) in zip(images, valid, strict=True):
        image[rows:] = 0
    return [Tile(i, hw, Window(0, 0, *hw)) for i, hw in zip(images, valid, strict=True)]


def served_config(file: Path, max_batch: int = 3, canvases: Sequence[Canvas] = ()) -> ModelConfig:
    """What config.json says of a version with this package."""
    data = file.read_bytes()
    spec = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    return ModelConfig.model_validate(
        {
            "name": "tiny",
            "version": 1,
            "input": CONFIG.input.model_dump(),
            "classes": [c.model_dump() for c in CONFIG.classes],
            "candidates": 60,
            "mask_stride": 4,
            "postprocess": {**CONFIG.postprocess.model_dump(), "score_threshold": 0.1},
            "limits": {"max_batch": max_batch},
            "canvases": canvases,
            "files": {file.name: spec},
        }
    )


def serve(runner: Runner, info: PackageInfo = INFO) -> SlotBackend:
    return serve_package([build_host_slot(info, runner, 1)], info, "cpu", "test")


def eager_backend(network: Solo) -> SlotBackend:
    """The backend with the network itself in place of compiled code."""

    def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            return network.candidates(*inputs)

    return serve(run)
