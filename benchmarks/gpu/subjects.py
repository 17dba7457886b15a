"""The paper's networks on one image, with forced candidates.

Weights are random: speed does not depend on them, but post-processing would have nothing to do.
So each network computes its candidates as usual and then replaces them, in the same graph, by those
of a crowded image: `OBJECTS` ellipses, each found by K / OBJECTS candidates that overlap. The
replacement counts as the engine's time: compiled, it is part of the last pass over the masks.

Symbols: B batch, K candidates, H W canvas, h w mask at the finest stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.inputs import build_jpeg
from export.onnx_graph import num_candidates
from pipeline.decode import decode_image
from pipeline.model_config import ClassSpec, InputSpec, KeepRatioResize, ModelConfig
from pipeline.preprocess import prepare
from pipeline.types import Tile
from tests.support.tiny_solo import tiny_config
from training.configs import get_config
from training.configs.schema import Config
from training.model.head import LevelOutput
from training.model.solo import Solo

IMAGE_HW = (800, 1333)
"""At scale 1 on SOLO's canvas of 800x1344 px; SOLO-512's is 512x864."""
OBJECTS = 100
PAPER_FPS = {"solo_r50": 12.1, "solo_r101": 10.4, "solo_512_r50": 22.5, "solo_512_r101": 19.2}
"""On a V100, of the models whose speed the paper gives."""


def _decoupled_512(name: str, base: str) -> Config:
    small = get_config("solo_512_r50")
    return replace(get_config(base), name=name, input=small.input)


def _tiny(name: str) -> Config:
    resize = KeepRatioResize(short_side=64, long_side=107)
    tiny = tiny_config("decoupled" if "decoupled" in name else "vanilla", "paper", name)
    frozen = replace(tiny.model.backbone, norm="frozen_bn")
    model = replace(tiny.model, backbone=frozen)
    return replace(tiny, model=model, num_classes=3, classes=(), input=InputSpec(resize=resize))


MODELS = (
    "solo_512_r50",
    "solo_r50",
    "decoupled_solo_512_r50",
    "decoupled_solo_r50",
    "solo_512_r101",
    "solo_r101",
    "decoupled_solo_512_r101",
    "decoupled_solo_r101",
)
QUICK_MODELS = ("tiny_vanilla", "tiny_decoupled")


def find_config(name: str) -> Config:
    """A model of the paper, its decoupled twin at 512 px, or one for `--quick`."""
    if name in QUICK_MODELS:
        return _tiny(name)
    if name.startswith("decoupled_solo_512_"):
        return _decoupled_512(name, name.replace("_512", ""))
    return get_config(name)


class ForcedSolo(Solo):
    """A network whose candidates are those of `force`."""

    forced_scores: Tensor
    forced_labels: Tensor
    forced_ellipses: Tensor

    def force(self, scores: Tensor, labels: Tensor, ellipses: Tensor) -> None:
        """Scores [K], labels [K] and ellipses [K, 4] of every image.

        An ellipse is its centre and half axes, y before x, in heights and widths of the canvas.
        """
        self.register_buffer("forced_scores", scores, False)
        self.register_buffer("forced_labels", labels, False)
        self.register_buffer("forced_ellipses", ellipses, False)

    def rank(self, outputs: Sequence[LevelOutput]) -> tuple[Tensor, Tensor, Tensor]:
        """The forced candidates: the conditions are never true, which no compiler can know."""
        scores, labels, probs = super().rank(outputs)
        height, width = probs.shape[-2:]
        y = torch.arange(height, device=probs.device)[:, None] / height
        x = torch.arange(width, device=probs.device) / width
        centre_y, centre_x, half_y, half_x = self.forced_ellipses[..., None, None].unbind(1)
        distance = ((y - centre_y) / half_y) ** 2 + ((x - centre_x) / half_x) ** 2
        ellipses = torch.sigmoid(4 * (1 - distance)).to(probs.dtype)
        return (
            torch.where(scores > 2, scores, self.forced_scores),
            torch.where(scores > 2, labels, self.forced_labels),
            torch.where(probs > 2, probs, ellipses),
        )


@dataclass(frozen=True)
class GpuSubject:
    """One network and its input.

    Attributes:
        config: Of the network.
        network: In evaluation mode, on the CPU.
        served: The service's configuration of it; its files are missing.
        jpeg: The image.
        tile: The image's canvas.
    """

    config: Config
    network: ForcedSolo
    served: ModelConfig
    jpeg: bytes
    tile: Tile

    @property
    def canvas_hw(self) -> tuple[int, int]:
        """H, W."""
        return self.tile.image.shape[0], self.tile.image.shape[1]


def build_subject(name: str, max_batch: int) -> GpuSubject:
    """Builds a network of random weights and its image."""
    config = find_config(name)
    torch.manual_seed(0)
    network = ForcedSolo(config.model, config.num_classes).eval()
    image_hw = (64, 107) if name in QUICK_MODELS else IMAGE_HW
    jpeg = build_jpeg(*image_hw)
    (tile,) = prepare(decode_image(jpeg), config.input).tiles
    stride = min(config.model.head.mask_strides)
    count = num_candidates(network)
    network.force(*_forced(count, config.num_classes))
    classes = [ClassSpec(category_id=i + 1, name=f"c{i}") for i in range(config.num_classes)]
    served = ModelConfig.model_validate(
        {
            "name": config.name,
            "version": 1,
            "input": config.input.model_dump(),
            "classes": [c.model_dump() for c in classes],
            "candidates": count,
            "mask_stride": stride,
            "postprocess": config.postprocess.model_dump(),
            "limits": {"max_batch": max_batch},
            "files": {"model.onnx": {"sha256": "0" * 64, "bytes": 1}},
        }
    )
    return GpuSubject(config, network, served, jpeg, tile)


def _forced(count: int, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates, best first: one of every object, then shifted duplicates of each."""
    rng = np.random.default_rng(0)
    objects = min(OBJECTS, count)
    side = np.exp(rng.uniform(np.log(0.01), np.log(0.3), objects))  # even over the octaves
    shapes = np.stack(
        [*rng.uniform(0, 1, (2, objects)), side, side * rng.uniform(0.3, 0.8, objects)], axis=1
    )
    index = np.arange(count)
    ellipses = shapes[index % objects].astype(np.float32)
    ellipses[:, :2] += 0.003 * (index // objects)[:, None]
    scores = np.linspace(0.95, 0.11, count, dtype=np.float32)
    return (
        torch.from_numpy(scores),
        torch.from_numpy(index % objects % num_classes),
        torch.from_numpy(ellipses),
    )
