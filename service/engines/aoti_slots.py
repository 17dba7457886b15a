"""Slots of AOTInductor: each runs one batch at a time and owns all that the batch needs.

No torch here: what a slot asks of it is the protocol `GraphDevice`.

Symbols: B batch, K candidates, H W canvas, h w mask at the mask stride.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import numpy as np

from pipeline.postprocess import TileCandidates
from pipeline.types import Int64, Tile, UInt8
from service.engines.base import BackendError, split_batch

SLOTS = 2
"""Batches at once on a GPU: one is copied while the other is computed."""
MAX_GRAPHS = 16
"""Batch sizes and canvases of which a slot keeps the recorded graph."""
WAIT_S = 60.0
"""How long a batch waits for a slot before something must be wrong."""

Select = Callable[[list[Any], int], Sequence[TileCandidates]]
"""Makes candidates of outputs on the device, in the order of a stream (its handle); the outputs are
theirs."""


def batch_sizes(max_batch: int) -> tuple[int, ...]:
    """Batches that are recorded, ascending: powers of two and the largest; others are padded."""
    powers = [1 << power for power in range(max_batch.bit_length()) if 1 << power < max_batch]
    return (*powers, max_batch)


class Slot(Protocol):
    """Runs one batch at a time."""

    def run(self, tiles: Sequence[Tile]) -> list[TileCandidates]:
        """Runs B canvases of one shape; the results do not need the slot any more."""
        ...

    def close(self) -> None:
        """Frees what it holds."""
        ...


@dataclass(frozen=True)
class Inputs:
    """Where a batch is written, and where the engine reads it.

    Attributes:
        images: [B, H, W, 3] uint8, pinned memory of the host.
        valid_hw: [B, 2] int64, likewise.
        host, device: The same two as tensors, and their copies on the device.
    """

    images: UInt8
    valid_hw: Int64
    host: Sequence[Any]
    device: Sequence[Any]


class GraphDevice(Protocol):
    """A GPU's stream, its memory and its recorded graphs."""

    @property
    def stream(self) -> int:
        """The stream's handle."""
        ...

    def build_inputs(self, batch: int, canvas_hw: tuple[int, int]) -> Inputs:
        """Memory for batches of one shape."""
        ...

    def upload(self, inputs: Inputs) -> None:
        """Copies inputs to the device, in the stream's order; the host does not wait."""
        ...

    def wait_for_upload(self) -> None:
        """Waits until the host may write into the inputs again."""
        ...

    def capture(self, run: Callable[[], Sequence[Any]]) -> tuple[Callable[[], None], Sequence[Any]]:
        """Records a run: what replays it, and the outputs, which stay where they are."""
        ...

    def clone(self, tensors: Sequence[Any]) -> list[Any]:
        """Copies of tensors on the device, in the stream's order."""
        ...

    def to_host(self, tensors: Sequence[Any]) -> list[Any]:
        """Copies of tensors as arrays of their own memory, there when this returns."""
        ...

    def close(self) -> None:
        """Waits for what is under way and frees the memory."""
        ...


@dataclass(frozen=True)
class _Recorded:
    inputs: Inputs
    replay: Callable[[], None]
    outputs: Sequence[Any]


class GraphSlot:
    """Replays one recorded graph for each batch size and canvas, on a stream of its own.

    Args:
        device: Not shared with another slot.
        runner: The package's code, not shared either.
        sizes: Batches that are recorded, ascending.
        select: Post-processes on the device; None copies the outputs to the host.
        capturing: Held while a graph is recorded; all slots of a process share it, because a
            recording must not see another thread's new memory.
        max_graphs: Recorded graphs that are kept, least recently used first to go.
    """

    def __init__(
        self,
        device: GraphDevice,
        runner: Callable[[Sequence[Any]], Sequence[Any]],
        sizes: Sequence[int],
        select: Select | None,
        capturing: threading.Lock,
        max_graphs: int = MAX_GRAPHS,
    ) -> None:
        self._device = device
        self._runner = runner
        self._sizes = tuple(sizes)
        self._select = select
        self._capturing = capturing
        self._max_graphs = max_graphs
        self._recorded: OrderedDict[tuple[int, tuple[int, int]], _Recorded] = OrderedDict()

    def run(self, tiles: Sequence[Tile]) -> list[TileCandidates]:
        """See `Slot.run`."""
        canvas_hw = (tiles[0].image.shape[0], tiles[0].image.shape[1])
        size = next(size for size in self._sizes if size >= len(tiles))
        recorded = self._find(size, canvas_hw)
        self._device.wait_for_upload()
        for row, tile in enumerate(tiles):
            recorded.inputs.images[row] = tile.image
            recorded.inputs.valid_hw[row] = tile.valid_hw
        # Padding keeps the pixels of an earlier batch: nobody reads its results.
        recorded.inputs.valid_hw[len(tiles) :] = canvas_hw
        self._device.upload(recorded.inputs)
        recorded.replay()
        outputs = [output[: len(tiles)] for output in recorded.outputs]
        if self._select is None:
            return self._fetch(outputs)
        # An image's tiles may need many batches before the first is post-processed: a slot that
        # waited for its outputs to be used could wait for ever. The copy is at the device's speed.
        return list(self._select(self._device.clone(outputs), self._device.stream))

    def _find(self, size: int, canvas_hw: tuple[int, int]) -> _Recorded:
        key = (size, canvas_hw)
        if key in self._recorded:
            self._recorded.move_to_end(key)
            return self._recorded[key]
        while len(self._recorded) >= self._max_graphs:
            self._recorded.popitem(last=False)
        inputs = self._device.build_inputs(size, canvas_hw)
        inputs.images[:] = 0
        inputs.valid_hw[:] = canvas_hw
        self._device.upload(inputs)
        with self._capturing:
            replay, outputs = self._device.capture(lambda: self._runner(inputs.device))
        self._recorded[key] = _Recorded(inputs, replay, outputs)
        return self._recorded[key]

    def _fetch(self, outputs: Sequence[Any]) -> list[TileCandidates]:
        """Copies to the host only the masks up to the last used slot: empty ones come last."""
        scores, labels = self._device.to_host(outputs[:2])
        used = int((scores > 0).sum(axis=1).max(initial=0))
        (masks,) = self._device.to_host([outputs[2][:, :used]])
        return list(split_batch(scores[:, :used], labels[:, :used], np.asarray(masks)))

    def close(self) -> None:
        """See `Slot.close`."""
        self._recorded.clear()
        self._device.close()


class SlotPool:
    """Lends slots; one that comes back after `close` is closed then.

    Args:
        slots: At least one.
        wait_s: How long `take` waits.
    """

    def __init__(self, slots: Sequence[Slot], wait_s: float = WAIT_S) -> None:
        self._free: SimpleQueue[Slot | None] = SimpleQueue()  # None: closed
        self._wait_s = wait_s
        self._closed = False
        for slot in slots:
            self._free.put(slot)

    def take(self) -> Slot:
        """A free slot, waited for.

        Raises:
            BackendError: The pool is closed, or no slot came back in time.
        """
        try:
            slot = self._free.get(timeout=self._wait_s)
        except Empty:
            raise BackendError(f"no slot was given back within {self._wait_s:g} s") from None
        if slot is None or self._closed:
            self._free.put(None)  # whoever else waits wakes up too
            if slot is not None:
                slot.close()
            raise BackendError("the engine is closed")
        return slot

    def give(self, slot: Slot) -> None:
        """Takes a slot back."""
        self._free.put(slot)
        if self._closed:
            self._close_free()

    def close(self) -> None:
        """Closes the free slots now, the others when they come back; can be called again."""
        self._closed = True
        self._close_free()

    def _close_free(self) -> None:
        with contextlib.suppress(Empty):
            while True:
                slot = self._free.get_nowait()
                if slot is not None:
                    slot.close()
        self._free.put(None)
