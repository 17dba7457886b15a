"""The slot of every engine on a GPU: what one batch in flight needs there.

It has a stream, pinned and device memory for the inputs, memory for the outputs, and a CUDA graph
for each batch size and canvas that it was warmed up for. Other shapes run without a graph:
recording one takes longer than a request may wait. An engine supplies only how it is bound to that
memory and how a run is queued (`EngineCall`). NOT RUN ON HARDWARE.

Symbols: B batch, K candidates, H W canvas, h w mask at the mask stride.
"""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

import numpy as np

from pipeline.canvases import find_recorded, list_canvases
from pipeline.model_config import Canvas, ModelConfig
from pipeline.postprocess import TileCandidates
from pipeline.types import Tile, UInt8, Window
from service.engines.base import BackendError, split_batch
from service.engines.calls import (
    BatchShape,
    EngineCall,
    EngineOutputs,
    EngineRun,
    SlotMemory,
    widen,
)
from service.engines.device import (
    RECORDING,
    CudaDevice,
    DeviceMemory,
    PinnedMemory,
    cuda_errors,
)
from service.engines.kernels.postprocessor import Select
from service.engines.kernels.select import ITEM_BYTES, DeviceBatch
from service.engines.slots import Slot, ThreadSlot

logger = logging.getLogger(__name__)

GPU_SLOTS = 2
"""Slots on a GPU: one batch is copied while the other is computed."""
FIRST_SIZES = (1, 4)
"""Smallest batch sizes; the larger ones are powers of two."""
MAX_SHAPES = 4
"""Shapes without a graph that a slot keeps bound."""
KEPT_BUFFERS = 2
"""Free buffers of outputs that a slot keeps for the next batches."""


def list_batch_sizes(max_batch: int) -> tuple[int, ...]:
    """Batch sizes that a GPU runs, ascending: 1, 4, 8, 16, ..., the largest; others are padded."""
    sizes = list(FIRST_SIZES)
    while sizes[-1] < max_batch:
        sizes.append(2 * sizes[-1])
    return (*(size for size in sizes if size < max_batch), max_batch)


def list_shapes(config: ModelConfig) -> list[Canvas]:
    """Every canvas that a slot may get: those of the resize rule, and those that are padded to."""
    return sorted({*list_canvases(config.input), *config.canvases})


class DeviceSlot:
    """A batch in flight on a GPU.

    Outputs are copied on the device from the engine's memory to buffers that the candidates own. So
    the slot takes the next batch while they live: an image's tiles may need many batches before
    the first is post-processed.

    Args:
        device: The GPU.
        build: Gives the engine's call, given the handle of the slot's stream.
        max_batch: Largest batch.
        canvases: The model's.
        select: Post-processes on the device; None copies the candidates to the host.
        max_shapes: Shapes without a graph that are kept bound; the least recently used goes first.

    Attributes:
        has_graphs: Whether `warm_up` records; False after a recording has failed.
    """

    def __init__(
        self,
        device: CudaDevice,
        build: Callable[[int], EngineCall],
        *,
        max_batch: int,
        canvases: Sequence[Canvas],
        select: Select | None,
        has_graphs: bool = True,
        max_shapes: int = MAX_SHAPES,
    ) -> None:
        self._device = device
        self._sizes = list_batch_sizes(max_batch)
        self._select = select
        self._max_shapes = max_shapes
        self.has_graphs = has_graphs
        # The garbage collector returns buffers at any point of any thread: a deque needs no lock.
        self._free: deque[DeviceMemory] = deque()
        self._warm: dict[BatchShape, list[EngineRun]] = {}
        self._bound: OrderedDict[BatchShape, EngineRun] = OrderedDict()
        self._host: PinnedMemory | None = None
        device.activate()
        with contextlib.ExitStack() as undo:
            self._stream = device.open_stream()
            undo.callback(device.close_stream, self._stream)
            self._call = build(self._stream)
            undo.callback(self._call.close)
            max_pixels = max(height * width for height, width in canvases)
            self._memory = SlotMemory(device, self._stream, max_batch, max_pixels)
            undo.pop_all()

    def infer(self, tiles: Sequence[Tile]) -> Sequence[TileCandidates]:
        """Runs one batch; waits for the device."""
        self._device.activate()
        canvas_hw = (tiles[0].image.shape[0], tiles[0].image.shape[1])
        size = next(size for size in self._sizes if size >= len(tiles))
        used = BatchShape(len(tiles), canvas_hw)
        try:
            self._memory.upload(tiles, BatchShape(size, canvas_hw))
            outputs = self._find_run(BatchShape(size, canvas_hw)).enqueue()
            if self._select is None:
                return self._fetch(outputs, used)
            return self._keep(self._select, outputs, used)
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to report
                self._device.synchronize(self._stream)
            raise

    def interrupt(self) -> None:
        """Does nothing: a call on a GPU cannot be ended from outside."""

    def warm_up(self, canvas_hw: Canvas) -> None:
        """Binds and records every batch size on a canvas, and runs it; it is kept until `close`."""
        self._device.activate()
        image = np.full((*canvas_hw, 3), 128, np.uint8)
        for size in reversed(self._sizes):  # the largest first: libraries allocate once
            tiles = [Tile(image, canvas_hw, Window(0, 0, *canvas_hw))] * size
            shape = BatchShape(size, canvas_hw)
            self._memory.upload(tiles, shape)
            self._warm[shape] = [self._call.bind(shape, self._memory)]
            self._record(shape, self._warm[shape])
            self.infer(tiles)

    def close(self) -> None:
        """Waits for the stream and frees everything but buffers of live candidates."""
        self._device.activate()
        with contextlib.suppress(BackendError):
            self._device.synchronize(self._stream)
        with contextlib.ExitStack() as closing:  # all of it, also where one of it fails
            closing.callback(self._device.close_stream, self._stream)
            for memory in (*self._free, *([self._host] if self._host else [])):
                closing.callback(self._device.free, memory)
            self._free.clear()
            closing.callback(self._memory.close)
            closing.callback(self._call.close)
            for run in self._bound.values():
                closing.callback(run.close)
            for runs in self._warm.values():
                for run in runs:
                    closing.callback(run.close)
            self._bound.clear()
            self._warm.clear()

    def _find_run(self, shape: BatchShape) -> EngineRun:
        """The run of a shape; one that is not warm is bound now, but not recorded."""
        if shape in self._warm:
            return self._warm[shape][-1]
        if shape in self._bound:
            self._bound.move_to_end(shape)
            return self._bound[shape]
        logger.info("images %dx%dx%d run without a CUDA graph", shape.batch, *shape.canvas_hw)
        while len(self._bound) >= self._max_shapes:
            self._device.synchronize(self._stream)
            self._bound.popitem(last=False)[1].close()
        self._bound[shape] = self._call.bind(shape, self._memory)
        return self._bound[shape]

    def _record(self, shape: BatchShape, runs: list[EngineRun]) -> None:
        """Appends the recorded run to a shape's run, where that works; its inputs are uploaded."""
        (run,) = runs
        if not self.has_graphs or run.record is None:
            return
        run.enqueue()  # what a library does only in its first run must not be recorded
        self._device.synchronize(self._stream)
        try:
            with RECORDING:
                runs.append(run.record())
        except Exception as error:  # CUDA's errors have no common base
            self.has_graphs = False
            logger.warning(
                "no CUDA graphs, for images %dx%dx%d: %s", shape.batch, *shape.canvas_hw, error
            )

    def _keep(
        self, select: Select, outputs: EngineOutputs, used: BatchShape
    ) -> list[TileCandidates]:
        """Candidates on the device, with a copy of the outputs that they own."""
        layout = outputs.layout
        held = [self._take(layout.count_bytes(used))]

        def release() -> None:
            with contextlib.suppress(IndexError):  # only the first call returns the buffer
                self._free.append(held.pop())

        kept = layout.place(held[0].pointer, used)
        scores_bytes, labels_bytes, masks_bytes = layout.sizes(used)
        try:
            self._device.copy(kept.scores, outputs.scores, scores_bytes, self._stream)
            self._device.copy(kept.labels, outputs.labels, labels_bytes, self._stream)
            self._device.copy(kept.mask_probs, outputs.mask_probs, masks_bytes, self._stream)
            batch = DeviceBatch(
                scores=kept.scores,
                labels=kept.labels,
                mask_probs=kept.mask_probs,
                mask_type=layout.mask_type,
                batch=used.batch,
                candidates=layout.candidates,
                mask_hw=layout.mask_hw(used),
                release=release,
            )
            return list(select(batch, self._stream))
        except BaseException:
            release()
            raise

    def _take(self, size_bytes: int) -> DeviceMemory:
        """A buffer that is large enough; never waits for one to be returned."""
        while len(self._free) > KEPT_BUFFERS:
            self._device.free(self._free.popleft())
        if self._free:  # only one thread at a time takes
            buffer = self._free.popleft()
            if buffer.size_bytes >= size_bytes:
                return buffer
            self._device.free(buffer)
        return self._device.allocate(size_bytes)

    def _fetch(self, outputs: EngineOutputs, used: BatchShape) -> Sequence[TileCandidates]:
        """Candidates on the host: scores, labels, and masks up to the last slot in use."""
        layout = outputs.layout
        scores_bytes, labels_bytes, _ = layout.sizes(used)
        slots = (used.batch, layout.candidates)
        ranking = self._copy_to_host(
            [(outputs.labels, labels_bytes), (outputs.scores, scores_bytes)]
        ).copy()
        labels = ranking[:labels_bytes].view(np.int64).reshape(slots)
        scores = ranking[labels_bytes:].view(np.float32).reshape(slots)
        count = 1 + int(np.flatnonzero((scores > 0).any(axis=0)).max(initial=-1))
        mask_hw = layout.mask_hw(used)
        mask_bytes = mask_hw[0] * mask_hw[1] * ITEM_BYTES[layout.mask_type]
        first, row_bytes = outputs.mask_probs, layout.candidates * mask_bytes
        rows = [(first + row * row_bytes, count * mask_bytes) for row in range(used.batch)]
        masks = widen(self._copy_to_host(rows), layout.mask_type)
        return split_batch(
            scores[:, :count], labels[:, :count], masks.reshape(used.batch, count, *mask_hw)
        )

    def _copy_to_host(self, parts: Sequence[tuple[int, int]]) -> UInt8:
        """Copies (address, bytes) of the device one behind the other; valid until the next call."""
        total = sum(size_bytes for _, size_bytes in parts)
        if self._host is None or self._host.size_bytes < total:
            if self._host is not None:
                self._device.free(self._host)
            self._host = self._device.allocate_pinned(total)
        target = self._host.pointer
        for address, size_bytes in parts:
            if size_bytes:
                self._device.copy(target, address, size_bytes, self._stream)
            target += size_bytes
        self._device.synchronize(self._stream)
        return self._host.array[:total]


def build_device_slots(
    count: int | None, build: Callable[[], DeviceSlot], config: ModelConfig, *, threads: bool
) -> tuple[list[Slot], bool]:
    """Slots on a GPU, warmed up for every batch size on the model's canvases.

    Args:
        count: None takes `GPU_SLOTS`.
        build: Gives one slot.
        config: The model's.
        threads: Whether each slot needs a thread of its own.

    Returns:
        The slots, and whether all of them record graphs.

    Raises:
        CudaError: An engine or a library fails.
        BackendError: The engine was not made for the model's canvases.
    """
    canvases = sorted(find_recorded(config), key=lambda hw: -hw[0] * hw[1])
    if not canvases:
        logger.warning(
            "%s lists no canvases in config.json, so it runs without CUDA graphs and in small "
            "batches; solo-export lists them",
            config.name,
        )
    slots: list[Slot] = []
    built: list[DeviceSlot] = []

    def build_and_warm_up() -> DeviceSlot:
        slot = build()
        try:
            for canvas_hw in canvases:
                slot.warm_up(canvas_hw)
        except BaseException:
            slot.close()
            raise
        built.append(slot)
        return slot

    try:
        with cuda_errors("prepare the engine"):
            for _ in range(count or GPU_SLOTS):
                slots.append(ThreadSlot(build_and_warm_up) if threads else build_and_warm_up())
    except BaseException:
        for slot in slots:
            slot.close()
        raise
    return slots, all(slot.has_graphs for slot in built)
