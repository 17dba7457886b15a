"""The interface of an engine and its slot on a GPU: shapes, addresses, and how a run is queued.

Symbols: B batch, K candidates, H W canvas, h w mask at the mask stride.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.model_config import Canvas
from pipeline.types import Tile, UInt8
from service.engines.base import BackendError
from service.engines.device import CudaDevice, DeviceMemory
from service.engines.kernels.select import ITEM_BYTES, MaskType

_ALIGN_BYTES = 256


@dataclass(frozen=True)
class BatchShape:
    """A batch size and a canvas, B and H, W."""

    batch: int
    canvas_hw: Canvas

    @property
    def pixels(self) -> int:
        """Of one canvas."""
        return self.canvas_hw[0] * self.canvas_hw[1]


@dataclass(frozen=True, kw_only=True)
class OutputLayout:
    """Shapes and types of a graph's outputs.

    Attributes:
        candidates: K.
        mask_stride: Canvas px per mask px.
        mask_type: How mask probabilities are stored.
    """

    candidates: int
    mask_stride: int
    mask_type: MaskType

    def mask_hw(self, shape: BatchShape) -> tuple[int, int]:
        """h, w."""
        height, width = (side // self.mask_stride for side in shape.canvas_hw)
        return height, width

    def shapes(self, shape: BatchShape) -> dict[str, tuple[int, ...]]:
        """Of the outputs, by name."""
        slots = (shape.batch, self.candidates)
        return {"scores": slots, "labels": slots, "mask_probs": (*slots, *self.mask_hw(shape))}

    def sizes(self, shape: BatchShape) -> tuple[int, int, int]:
        """Bytes of scores, labels and masks."""
        slots = shape.batch * self.candidates
        height, width = self.mask_hw(shape)
        return 4 * slots, 8 * slots, slots * height * width * ITEM_BYTES[self.mask_type]

    def place(self, start: int, shape: BatchShape) -> EngineOutputs:
        """Addresses of the outputs, one after the other, from an address on."""
        scores, labels, _ = self.sizes(shape)
        return EngineOutputs(
            self, start, start + _align(scores), start + _align(scores) + _align(labels)
        )

    def count_bytes(self, shape: BatchShape) -> int:
        """Bytes that `place` needs."""
        return self.place(0, shape).mask_probs + self.sizes(shape)[2]


@dataclass(frozen=True)
class EngineOutputs:
    """Where a run leaves its outputs: addresses of scores, labels and mask_probs."""

    layout: OutputLayout
    scores: int
    labels: int
    mask_probs: int


@dataclass(frozen=True)
class EngineRun:
    """An engine that is bound to a slot's memory for one shape.

    Attributes:
        enqueue: Queues a run on the slot's stream; its outputs are valid until the next run.
        record: Records the same run as a CUDA graph; None for a run that is recorded.
        close: Frees what the run holds.
    """

    enqueue: Callable[[], EngineOutputs]
    record: Callable[[], EngineRun] | None = None
    close: Callable[[], None] = lambda: None


class EngineCall(Protocol):
    """How one slot calls its engine."""

    def bind(self, shape: BatchShape, memory: SlotMemory) -> EngineRun:
        """Binds the engine to the slot's memory for a shape.

        Raises:
            BackendError: The engine was not made for the shape.
        """
        ...

    def close(self) -> None:
        """Frees what the engine holds for this slot."""
        ...


class SlotMemory:
    """Memory of a device slot: inputs, pinned and on the device, and the engine's outputs.

    `valid_hw` and then `images` lie in one region, so one copy uploads both. Everything is
    allocated for the largest shape and never moves, because recorded graphs hold its addresses.

    Args:
        device: The GPU.
        stream: Handle of the stream that copies and runs are queued on.
        max_batch: Largest batch.
        max_pixels: Largest canvas.
    """

    def __init__(self, device: CudaDevice, stream: int, max_batch: int, max_pixels: int) -> None:
        self.stream = stream
        self._device = device
        self._max_batch, self._max_pixels = max_batch, max_pixels
        self._start = _align(16 * max_batch)
        self._written = 3 * max_batch * max_pixels
        self._host = device.allocate_pinned(self._start + self._written)
        self._inputs = device.allocate(self._start + self._written)
        self._outputs: DeviceMemory | None = None
        self._uploaded: Any = None

    @property
    def valid_hw(self) -> int:
        """Address of valid_hw [B, 2] int64 on the device."""
        return self._inputs.pointer

    @property
    def images(self) -> int:
        """Address of images [B, H, W, 3] uint8 on the device."""
        return self._inputs.pointer + self._start

    def outputs(self, layout: OutputLayout, shape: BatchShape) -> EngineOutputs:
        """Memory for an engine that writes its outputs to given addresses; allocated once."""
        if self._outputs is None:
            slots = self._max_batch * layout.candidates
            mask_bytes = ITEM_BYTES[layout.mask_type] * self._max_pixels // layout.mask_stride**2
            size_bytes = _align(4 * slots) + _align(8 * slots) + slots * mask_bytes
            self._outputs = self._device.allocate(size_bytes)
        return layout.place(self._outputs.pointer, shape)

    def upload(self, tiles: Sequence[Tile], shape: BatchShape) -> None:
        """Queues the copy of a batch to the device, padded with black canvases.

        Pixels of earlier batches are overwritten: an image that makes the engine fail must not be
        in the padding of the next batch.

        Raises:
            BackendError: The canvas is larger than the memory.
        """
        if shape.pixels > self._max_pixels:
            raise BackendError(
                f"a canvas of {shape.canvas_hw}, the engine takes at most {self._max_pixels} px"
            )
        if self._uploaded is not None:  # the previous batch may not be copied yet
            self._device.wait(self._uploaded)
        frame = 3 * shape.pixels
        used, end = len(tiles) * frame, shape.batch * frame
        valid_hw = self._host.array[: 16 * shape.batch].view(np.int64).reshape(-1, 2)
        pixels = self._host.array[self._start :]
        images = pixels[:used].reshape(-1, *shape.canvas_hw, 3)
        self._written = max(self._written, used)  # behind it all is black
        for row, tile in enumerate(tiles):
            images[row], valid_hw[row] = tile.image, tile.valid_hw
        valid_hw[len(tiles) :] = shape.canvas_hw
        pixels[used : self._written] = 0
        self._written = used
        size_bytes = self._start + end
        self._device.copy(self._inputs.pointer, self._host.pointer, size_bytes, self.stream)
        self._uploaded = self._device.record(self.stream, self._uploaded)

    def close(self) -> None:
        """Frees the memory; the stream is idle."""
        for memory in (self._host, self._inputs, self._outputs):
            if memory is not None:
                self._device.free(memory)


def widen(raw: UInt8, mask_type: MaskType) -> NDArray[Any]:
    """Mask probabilities from their bytes; bfloat16, which NumPy lacks, becomes float32."""
    if mask_type == "bfloat16":  # the upper half of a float32
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(mask_type)


def _align(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
