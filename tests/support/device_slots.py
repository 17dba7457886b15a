"""A slot on a fake GPU, with an engine whose candidates a test chooses by its pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipeline.postprocess import TileCandidates
from pipeline.types import Candidates, Tile, Window
from service.engines.calls import BatchShape, EngineOutputs, EngineRun, OutputLayout, SlotMemory
from service.engines.device import CudaDevice
from service.engines.device_slot import DeviceSlot
from tests.support.blob_model import POISON
from tests.support.fake_cuda import FakeCuda, read_memory, view_memory
from tests.support.fake_gpu import HostSelect

CANVAS = (32, 64)
CANVASES = [(32, 64), (64, 32), (64, 64)]
LAYOUT = OutputLayout(candidates=4, mask_stride=4, mask_type="float32")
STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


class PixelCall:
    """As many candidates as a canvas's first pixel says; their masks show the valid rows.

    Attributes:
        bound: Shapes, each time that one was bound.
        unbound, closed: Shapes whose runs, and whose graphs, were closed.
    """

    def __init__(
        self, cuda: FakeCuda, device: CudaDevice, stream: int, layout: OutputLayout = LAYOUT
    ) -> None:
        self._cuda, self._device, self._stream, self._layout = cuda, device, stream, layout
        self.bound: list[BatchShape] = []
        self.unbound: list[BatchShape] = []
        self.closed: list[BatchShape] = []
        self.runs = 0
        self.is_closed = False
        self.seen: list[tuple[np.ndarray, np.ndarray]] = []

    def bind(self, shape: BatchShape, memory: SlotMemory) -> EngineRun:
        self.bound.append(shape)
        outputs = memory.outputs(self._layout, shape)

        def enqueue() -> EngineOutputs:
            step = lambda: self._compute(shape, memory, outputs)  # noqa: E731
            self._cuda.streams[self._stream].put(step)
            return outputs

        def record() -> EngineRun:
            graph = self._device.capture(self._stream, enqueue)

            def replay() -> EngineOutputs:
                self._device.launch_graph(graph, self._stream)
                return outputs

            def close() -> None:
                graph.close()
                self.closed.append(shape)

            return EngineRun(replay, close=close)

        return EngineRun(enqueue, record, close=lambda: self.unbound.append(shape))

    def _compute(self, shape: BatchShape, memory: SlotMemory, outputs: EngineOutputs) -> None:
        self.runs += 1
        batch, (height, width) = shape.batch, shape.canvas_hw
        images = read_memory(memory.images, np.uint8, (batch, height, width, 3))
        valid_hw = read_memory(memory.valid_hw, np.int64, (batch, 2))
        self.seen.append((images, valid_hw))
        if (images[:, 0, 0, 0] == POISON).any():
            raise RuntimeError("poisoned")
        shapes = self._layout.shapes(shape)
        dtype = STORED[self._layout.mask_type]
        scores = view_memory(outputs.scores, np.float32, shapes["scores"])
        masks = view_memory(outputs.mask_probs, dtype, shapes["mask_probs"])
        scores[:], masks[:] = 0, 0
        view_memory(outputs.labels, np.int64, shapes["labels"])[:] = np.arange(4)
        one = 0x3F80 if self._layout.mask_type == "bfloat16" else 1
        for row, count in enumerate(np.minimum(images[:, 0, 0, 0], 4)):
            scores[row, :count] = np.linspace(0.9, 0.5, count)
            masks[row, :count, : valid_hw[row, 0] // 4] = one

    def close(self) -> None:
        self.is_closed = True


class Rig:
    """A slot and what is behind it."""

    def __init__(
        self,
        cuda: FakeCuda,
        *,
        select: Callable[..., Any] | None = None,
        layout: OutputLayout = LAYOUT,
        **slot: Any,
    ) -> None:
        self.cuda = cuda
        self.device = CudaDevice()
        self.streams = cuda.open_streams
        self.calls: list[PixelCall] = []
        self.select = HostSelect(self.device) if select is None else select

        def build(stream: int) -> PixelCall:
            self.calls.append(PixelCall(cuda, self.device, stream, layout))
            return self.calls[-1]

        options = {"max_batch": 4, "canvases": CANVASES, "select": self.select, **slot}
        self.slot = DeviceSlot(self.device, build, **options)
        self.memory = cuda.open_buffers

    @property
    def call(self) -> PixelCall:
        return self.calls[0]


def build_tiles(counts: Sequence[int], canvas_hw: tuple[int, int] = CANVAS) -> list[Tile]:
    tiles = []
    for index, count in enumerate(counts):
        valid_hw = (canvas_hw[0] - 4 * index, canvas_hw[1])
        image = np.full((*canvas_hw, 3), count, np.uint8)
        tiles.append(Tile(image, valid_hw, Window(0, 0, *valid_hw)))
    return tiles


def check(tiles: Sequence[Tile], found: Sequence[TileCandidates]) -> None:
    """Each canvas has its own candidates."""
    for tile, candidates in zip(tiles, found, strict=True):
        assert isinstance(candidates, Candidates)
        count = min(4, int(tile.image[0, 0, 0]))
        np.testing.assert_allclose(candidates.scores, np.linspace(0.9, 0.5, count), rtol=1e-6)
        assert candidates.labels.tolist() == list(range(count))
        height, width = tile.image.shape[:2]
        expected = np.zeros((count, height // 4, width // 4), np.float32)
        expected[:, : tile.valid_hw[0] // 4] = 1
        np.testing.assert_array_equal(candidates.mask_probs, expected)
        assert candidates.mask_probs.dtype == np.float32
