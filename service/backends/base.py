"""What an engine is to the service.

Symbols: B batch, K candidates, H W canvas, h w mask at the mask stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from service.pipeline.postprocess import TileCandidates
from service.pipeline.types import Candidates, Float32, Int64, Tile, UInt8

Precision = Literal["fp32", "fp16", "bf16", "int8"]
EngineKind = Literal["auto", "ort", "trt", "aoti"]


class BackendError(RuntimeError):
    """The engine cannot be built, or its output is not what the graph contract says."""


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """How an engine is built.

    Attributes:
        device: "auto" takes CUDA where it works, "cuda" raises `DeviceError` where it does not.
        engine: "auto" takes the fastest that works; any other raises where it does not.
        precision: Of the engine's arithmetic.
        threads: Threads of one engine call on the CPU; None takes the real cores.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    engine: EngineKind = "auto"
    precision: Precision = "fp32"
    threads: int | None = None


class Backend(Protocol):
    """An engine that is built and ready."""

    @property
    def name(self) -> str:
        """Kind of engine, e.g. "onnxruntime"."""
        ...

    @property
    def device(self) -> str:
        """What it really runs on: "cpu" or "cuda"."""
        ...

    @property
    def precision(self) -> Precision:
        """Of its arithmetic."""
        ...

    @property
    def reason(self) -> str:
        """Why this engine and this device, one sentence."""
        ...

    @property
    def concurrency(self) -> int:
        """How many threads may be in `infer` at once: one batch is copied, another computed."""
        ...

    def infer(self, tiles: Sequence[Tile]) -> Sequence[TileCandidates]:
        """Runs one batch.

        Args:
            tiles: B canvases of one shape.

        Returns:
            B results without their empty slots (score 0), best first.
        """
        ...

    def close(self) -> None:
        """Frees what the engine holds."""
        ...


def collate(tiles: Sequence[Tile]) -> tuple[UInt8, Int64]:
    """Canvases of one shape as the graph's inputs.

    Returns:
        `images` [B, H, W, 3] and `valid_hw` [B, 2].
    """
    images = np.stack([tile.image for tile in tiles])
    return images, np.array([tile.valid_hw for tile in tiles], np.int64)


def split_batch(scores: Float32, labels: Int64, mask_probs: Float32) -> list[Candidates]:
    """Checks a graph's output and cuts it into one result for each canvas, empty slots dropped.

    Each result owns its memory, so that the batch's can go.

    Args:
        scores: [B, K] float32, 0 for an empty slot.
        labels: [B, K] int64.
        mask_probs: [B, K, h, w] float32.

    Raises:
        BackendError: Shapes that do not fit each other, or scores that are not finite.
    """
    if labels.shape != scores.shape or mask_probs.ndim != 4 or mask_probs.shape[:2] != scores.shape:
        raise BackendError(
            f"outputs do not fit: scores {scores.shape}, labels {labels.shape}, "
            f"mask_probs {mask_probs.shape}"
        )
    if not np.isfinite(scores).all():
        raise BackendError("scores are not finite")
    results = []
    for item_scores, item_labels, item_masks in zip(scores, labels, mask_probs, strict=True):
        kept = np.flatnonzero(item_scores > 0)
        results.append(Candidates(item_scores[kept], item_labels[kept], item_masks[kept]))
    return results
