"""The interface between the service and its engines.

Symbols: B batch, K candidates, H W canvas, h w mask at the mask stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from pipeline.model_config import ModelConfig
from pipeline.model_config import Precision as Precision
from pipeline.postprocess import TileCandidates
from pipeline.types import Candidates, Float32, Int64, Tile, UInt8
from service.cores import count_cores

EngineKind = Literal["auto", "ort", "openvino", "trt", "aoti"]


class BackendError(RuntimeError):
    """An engine cannot be built, fails, or breaks the graph contract."""


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """How an engine is built.

    Attributes:
        device: "auto" uses CUDA where it works, "cuda" raises `DeviceError` where it does not.
        engine: "auto" uses the fastest that works; any other raises where it does not.
        precision: Of the engine's arithmetic.
        precision_fallback: Whether a model without that precision gets fp32, which all have.
        free_precision: Whether the CPU may take any precision that costs next to no AP.
        threads: Threads of one engine call on the CPU; None takes the number of physical cores.
        slots: Batches in flight; None takes 1 on the CPU and 2 on each GPU.
        divide: On the CPU without `slots`, which models get a call of one thread for each of the
            `threads` instead of one call with all: those that cut images into tiles, or all; for
            callers that call it from several threads.
        cache: Folder for what is built and measured on this machine; None takes one in the
            version's folder for TensorRT, and the user's cache folder for other engines.
        gpu_mem_limit_bytes: Most GPU memory of ONNX Runtime's arena, for each slot.
        gpus: Ordinals of the GPUs; on each there are `slots` batches in flight.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    engine: EngineKind = "auto"
    precision: Precision = "fp32"
    precision_fallback: bool = False
    free_precision: bool = False
    threads: int | None = None
    slots: int | None = None
    divide: Literal["none", "tiles", "all"] = "none"
    cache: Path | None = None
    gpu_mem_limit_bytes: int | None = None
    gpus: tuple[int, ...] = (0,)


class Backend(Protocol):
    """A model's engine, ready to run."""

    @property
    def name(self) -> str:
        """Kind of engine, e.g. "onnxruntime"."""
        ...

    @property
    def device(self) -> str:
        """The device in use: "cpu" or "cuda"."""
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
        """How many threads may call `infer` at once."""
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


@runtime_checkable
class Interruptible(Protocol):
    """An engine whose calls can be interrupted."""

    def interrupt(self) -> None:
        """Makes calls in flight raise soon; the engine is not used afterwards."""
        ...


def divide_calls(options: BackendOptions, config: ModelConfig | None) -> tuple[int, BackendOptions]:
    """How many calls there are at once on the CPU, and the options of one.

    The tiles of an image are canvases of the same cost: one thread for each is faster than all
    threads for one after the other, which wait for each other after every operator.
    """
    has_tiles = config is not None and config.input.resize.rule == "tile"
    divide = options.divide == "all" or (options.divide == "tiles" and has_tiles)
    if options.slots is None and divide:
        return options.threads or count_cores(), replace(options, threads=1)
    return options.slots or 1, options


def collate(tiles: Sequence[Tile]) -> tuple[UInt8, Int64]:
    """Stacks canvases of one shape into the graph's inputs.

    Returns:
        `images` [B, H, W, 3] and `valid_hw` [B, 2].
    """
    if len(tiles) == 1:  # the canvas itself
        images = np.ascontiguousarray(tiles[0].image)[None]
    else:
        images = np.stack([tile.image for tile in tiles])
    return images, np.array([tile.valid_hw for tile in tiles], np.int64)


def split_batch(
    scores: Float32, labels: Int64, mask_probs: Float32, *, copy: bool = True
) -> list[Candidates]:
    """Checks a graph's outputs and splits them into one result a canvas, without empty slots.

    Args:
        scores: [B, K] float32, 0 for an empty slot.
        labels: [B, K] int64.
        mask_probs: [B, K, h, w] float32, or float16, which is cast.
        copy: False if nothing writes into the arrays afterwards: results are then views of them,
            if at least half of the slots are used. With fewer, copies need less memory.

    Raises:
        BackendError: The shapes do not match, or scores are not finite.
    """
    if labels.shape != scores.shape or mask_probs.ndim != 4 or mask_probs.shape[:2] != scores.shape:
        raise BackendError(
            f"outputs do not fit: scores {scores.shape}, labels {labels.shape}, "
            f"mask_probs {mask_probs.shape}"
        )
    if not np.isfinite(scores).all():
        raise BackendError("scores are not finite")
    used = scores > 0
    as_views = not copy and 2 * np.count_nonzero(used) >= used.size
    results = []
    for item_used, *outputs in zip(used, scores, labels, mask_probs, strict=True):
        count = int(np.count_nonzero(item_used))
        is_prefix = bool(item_used[:count].all())
        found = [output[:count] if is_prefix else output[item_used] for output in outputs]
        if is_prefix and not as_views:
            found = [output.copy() for output in found]
        item_scores, item_labels, item_masks = found
        results.append(
            Candidates(item_scores, item_labels, item_masks.astype(np.float32, copy=False))
        )
    return results
