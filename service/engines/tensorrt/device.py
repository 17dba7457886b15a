"""Memory, streams and graphs of one GPU through cuda-core. NOT RUN ON HARDWARE, see `trt`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from cuda.core import Buffer, Device, Stream
    from cuda.core.graph import Graph

Scalar = TypeVar("Scalar", bound=np.generic)


class Gpu:
    """The GPU that this process uses, its current device."""

    def __init__(self) -> None:
        from cuda.core import Device

        device = Device()
        device.set_current()
        self._id = device.device_id

    def enter(self) -> None:
        """Makes the GPU current in the calling thread, which every thread must do first."""
        self._device().set_current()

    def _device(self) -> Device:
        """cuda-core's object of the calling thread; it has one for each."""
        from cuda.core import Device

        return Device(self._id)

    def create_stream(self) -> Stream:
        """A stream that does not wait for the default one."""
        return self._device().create_stream()

    def allocate(self, size_bytes: int, stream: Stream) -> Buffer:
        """Memory on the device, usable on `stream` from now on."""
        return self._device().allocate(size_bytes, stream=stream)

    def allocate_pinned(self, size_bytes: int) -> Buffer:
        """Memory of the host that the device copies from and to by itself."""
        from cuda.core import LegacyPinnedMemoryResource

        return LegacyPinnedMemoryResource().allocate(size_bytes)


def host_array(buffer: Buffer, dtype: type[Scalar], shape: tuple[int, ...]) -> NDArray[Scalar]:
    """The first bytes of pinned memory as an array, which is valid as long as the buffer is."""
    size_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    assert size_bytes <= buffer.size
    memory = (ctypes.c_uint8 * size_bytes).from_address(int(buffer.handle))
    return np.frombuffer(memoryview(memory), dtype).reshape(shape)


def copy(source: Buffer, target: Buffer, size_bytes: int, stream: Stream) -> None:
    """Copies the first bytes of a buffer, in the order of the stream."""
    _part(target, size_bytes).copy_from(_part(source, size_bytes), stream=stream)


def _part(buffer: Buffer, size_bytes: int) -> Buffer:
    """The first bytes of a buffer; cuda-core copies whole buffers of one size only."""
    from cuda.core import Buffer

    return Buffer.from_handle(int(buffer.handle), size_bytes, owner=buffer)


def capture(stream: Stream, work: Callable[[], None]) -> Graph:
    """Records what `work` puts on a stream, as a graph; nothing runs.

    Raises:
        Exception: Whatever `work` raises, or CUDA where `work` does what cannot be recorded.
    """
    recorder = stream.create_graph_builder()
    recorder.begin_building("thread_local")
    try:
        work()
    finally:
        recorder.end_building()
    return recorder.complete()


def address(handle: Any) -> int:
    """A pointer or stream as TensorRT takes it."""
    return int(handle)
