"""Slots of a TensorRT engine: what one batch in flight needs. NOT RUN ON HARDWARE, see `trt`.

A slot has a stream, scratch memory, and input and output buffers for the engine's greatest shape.
For each shape and batch that it meets it makes an execution context over these buffers, runs it
once, and captures its next run as a CUDA graph. One context for each graph, for a graph holds only
as long as its context is not changed; they share the slot's scratch memory, and the least recently
used one goes when there are too many.

Symbols: B batch, H W canvas.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.canvases import Bucket, Canvas, find_bucket
from pipeline.types import Tile
from service.engines.base import BackendError
from service.engines.tensorrt.device import Gpu, address, capture, copy, host_array
from service.engines.tensorrt.tensors import (
    HOST_DTYPES,
    Shape,
    Tensor,
    count_bytes,
    read_shape,
    set_shapes,
)

if TYPE_CHECKING:
    import tensorrt as trt
    from cuda.core import Buffer, Stream
    from cuda.core.graph import Graph

logger = logging.getLogger(__name__)

MAX_GRAPHS = 16
"""Shapes and batches for which a slot keeps a graph."""
WAIT_S = 60.0
"""How long a batch waits for a slot before something must be wrong."""

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Outputs:
    """What a run left on the device.

    Attributes:
        addresses: Device pointers by name.
        shapes: By name; the first axis is the padded batch.
        dtypes: TensorRT's names, by name.
    """

    addresses: dict[str, int]
    shapes: dict[str, Shape]
    dtypes: dict[str, str]


@dataclass(frozen=True)
class _Prepared:
    """A context whose shapes and addresses are set, and its graph where one could be captured."""

    context: trt.IExecutionContext
    shapes: dict[str, Shape]
    graph: Graph | None


class LruCache(Generic[Key, Value]):
    """Keeps the `size` values that were used last.

    Args:
        size: At least 1.
        discard: Told of every value that goes.
    """

    def __init__(self, size: int, discard: Callable[[Value], None]) -> None:
        self._size = size
        self._discard = discard
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of a key, made if it is not there; room is made before."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        while len(self._values) >= self._size:
            self._discard(self._values.popitem(last=False)[1])
        self._values[key] = make()
        return self._values[key]

    def clear(self) -> None:
        """Lets everything go."""
        while self._values:
            self._discard(self._values.popitem(last=False)[1])


def padded_batches(max_batch: int) -> tuple[int, ...]:
    """Batches that are run: powers of two and the largest, so that few graphs serve all."""
    powers = [1 << power for power in range(max_batch.bit_length()) if 1 << power < max_batch]
    return (*powers, max_batch)


def pad_batch(batch: int, max_batch: int) -> int:
    """The least batch that is run and holds this one.

    Raises:
        BackendError: It is larger than the engine's largest.
    """
    fitting = [size for size in padded_batches(max_batch) if size >= batch]
    if not fitting:
        raise BackendError(f"images: {batch} canvases, the engine takes at most {max_batch}")
    return fitting[0]


class Slot:
    """Everything that one batch needs from its pixels to its outputs on the device.

    Args:
        gpu: Where.
        engine: Deserialised.
        tensors: Its inputs and outputs.
        buckets: One for each of its profiles.
        max_batch: Its largest batch.
        max_graphs: Shapes and batches whose graph is kept.
    """

    def __init__(
        self,
        gpu: Gpu,
        engine: trt.ICudaEngine,
        tensors: Sequence[Tensor],
        buckets: Sequence[Bucket],
        max_batch: int,
        max_graphs: int = MAX_GRAPHS,
    ) -> None:
        self._gpu = gpu
        self._engine = engine
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._buckets = buckets
        self._max_batch = max_batch
        self.stream: Stream = gpu.create_stream()
        self._scratch = gpu.allocate(max(1, engine.device_memory_size_v2), self.stream)
        self._device = {t.name: gpu.allocate(t.max_bytes, self.stream) for t in tensors}
        self._host: dict[str, Buffer] = {
            name: gpu.allocate_pinned(self._tensors[name].max_bytes)
            for name in ("images", "valid_hw")
        }
        self._prepared: LruCache[tuple[Canvas, int], _Prepared] = LruCache(max_graphs, _discard)
        self.has_graphs = True

    def run(self, tiles: Sequence[Tile]) -> Outputs:
        """Puts a batch on the stream; its outputs are there once the stream is in sync.

        Args:
            tiles: B canvases of one shape.

        Raises:
            BackendError: Names the tensor and the shape that TensorRT refuses.
        """
        self._gpu.enter()
        height, width = tiles[0].image.shape[:2]
        batch = pad_batch(len(tiles), self._max_batch)
        profile = self._find_profile((height, width))
        self._fill(tiles, batch, (height, width))
        key = ((height, width), batch)
        ready = self._prepared.get(key, lambda: self._prepare(profile, (height, width), batch))
        if ready.graph is not None:
            ready.graph.launch(self.stream)
        else:
            self._enqueue(ready.context, batch, (height, width))
        return Outputs(
            {name: address(self._device[name].handle) for name in ready.shapes},
            ready.shapes,
            {name: self._tensors[name].dtype for name in ready.shapes},
        )

    def fetch(self, outputs: Outputs, batch: int) -> dict[str, NDArray[np.generic]]:
        """Copies the first `batch` results to the host, and waits for them.

        Returns:
            Arrays that are valid until the slot's next batch; bfloat16 comes as float32.
        """
        arrays: dict[str, NDArray[np.generic]] = {}
        for name, shape in outputs.shapes.items():
            dtype = HOST_DTYPES[outputs.dtypes[name]]
            wanted = (batch, *shape[1:])
            size_bytes = count_bytes(wanted, outputs.dtypes[name])
            if name not in self._host:
                self._host[name] = self._gpu.allocate_pinned(self._tensors[name].max_bytes)
            copy(self._device[name], self._host[name], size_bytes, self.stream)
            arrays[name] = host_array(self._host[name], dtype, wanted)
        self.stream.sync()
        return {name: _widen(array, outputs.dtypes[name]) for name, array in arrays.items()}

    def recover(self) -> None:
        """Waits for what a failed run left on the stream, so that the slot can go on."""
        with suppress(Exception):  # the run's own error has been told
            self.stream.sync()

    def close(self) -> None:
        """Frees what the slot holds, once its stream is in sync."""
        self._gpu.enter()
        self.recover()
        self._prepared.clear()
        for buffer in (*self._device.values(), *self._host.values(), self._scratch):
            buffer.close()
        self.stream.close()

    def _fill(self, tiles: Sequence[Tile], batch: int, canvas: Canvas) -> None:
        """Writes the batch into pinned memory; what pads it is black."""
        images = host_array(self._host["images"], np.uint8, (batch, *canvas, 3))
        valid_hw = host_array(self._host["valid_hw"], np.int64, (batch, 2))
        for index, tile in enumerate(tiles):
            images[index] = tile.image
            valid_hw[index] = tile.valid_hw
        images[len(tiles) :] = 0
        valid_hw[len(tiles) :] = canvas

    def _find_profile(self, canvas: Canvas) -> int:
        try:
            return find_bucket(self._buckets, canvas)
        except ValueError as error:
            raise BackendError(f"images: {error}") from error

    def _prepare(self, profile: int, canvas: Canvas, batch: int) -> _Prepared:
        """A context for one shape, run once, and its graph."""
        context = self._create_context(profile, canvas, batch)
        shapes = {name: read_shape(context.get_tensor_shape(name)) for name in self._outputs()}
        self._enqueue(context, batch, canvas)  # what TensorRT does only once happens here
        self.stream.sync()
        graph = None
        if self.has_graphs:
            try:
                graph = capture(self.stream, lambda: self._enqueue(context, batch, canvas))
            except Exception as error:  # CUDA's errors have no common base
                self.has_graphs = False
                logger.warning("no CUDA graphs, for images %dx%dx%d: %s", batch, *canvas, error)
        return _Prepared(context, shapes, graph)

    def _create_context(self, profile: int, canvas: Canvas, batch: int) -> trt.IExecutionContext:
        import tensorrt as trt

        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise BackendError("TensorRT gives no execution context")
        context.set_device_memory(address(self._scratch.handle), self._scratch.size)
        if not context.set_optimization_profile_async(profile, address(self.stream.handle)):
            raise BackendError(f"images: TensorRT refuses profile {profile} for {canvas}")
        set_shapes(context, batch, canvas, f"profile {profile}")
        for name, buffer in self._device.items():
            if not context.set_tensor_address(name, address(buffer.handle)):
                raise BackendError(f"{name}: TensorRT refuses its address, {buffer.size} bytes")
        for name in self._outputs():
            shape = read_shape(context.get_tensor_shape(name))
            needed = count_bytes(shape, self._tensors[name].dtype)
            if min(shape) < 0 or needed > self._tensors[name].max_bytes:
                raise BackendError(
                    f"{name}: shape {shape} needs {needed} bytes, its buffer has "
                    f"{self._tensors[name].max_bytes}"
                )
        return context

    def _outputs(self) -> list[str]:
        return [name for name in self._tensors if name not in ("images", "valid_hw")]

    def _enqueue(self, context: trt.IExecutionContext, batch: int, canvas: Canvas) -> None:
        """Copies of the inputs and the engine's run; what a graph captures."""
        height, width = canvas
        for name, size_bytes in (("images", batch * height * width * 3), ("valid_hw", batch * 16)):
            copy(self._host[name], self._device[name], size_bytes, self.stream)
        if not context.execute_async_v3(address(self.stream.handle)):
            raise BackendError(f"TensorRT cannot run images {(batch, height, width, 3)}")


def _widen(array: NDArray[np.generic], dtype: str) -> NDArray[np.generic]:
    """Makes float32 of bfloat16, which are their upper halves; leaves all else."""
    if dtype != "BF16":
        return array
    return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _discard(prepared: _Prepared) -> None:
    if prepared.graph is not None:
        prepared.graph.close()


class SlotPool:
    """Lends slots; one that comes back after `close` is closed then."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._free = list(slots)
        self._changed = threading.Condition()
        self._closed = False

    def take(self, wait_s: float = WAIT_S) -> Slot:
        """A free slot, waited for.

        Raises:
            BackendError: The pool is closed, or no slot came back in time.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._closed, wait_s)
            if self._closed:
                raise BackendError("the engine is closed")
            if not self._free:
                raise BackendError(f"no slot was given back within {wait_s:g} s")
            return self._free.pop()

    def give(self, slot: Slot) -> None:
        """Takes a slot back."""
        with self._changed:
            if not self._closed:
                self._free.append(slot)
                self._changed.notify()
                return
        slot.close()

    def close(self) -> None:
        """Closes the free slots now, the others when they come back; can be called again."""
        with self._changed:
            self._closed = True
            idle, self._free = self._free, []
            self._changed.notify_all()
        for slot in idle:
            slot.close()
