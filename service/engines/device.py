"""One NVIDIA GPU through cuda-core: memory, streams, copies, events and recorded graphs.

Streams are their handles and memory is addresses, because ONNX Runtime, TensorRT, torch and the
kernels take exactly these. The tests run this module over a `cuda.core` whose memory is the host's,
and the kernel tests over the real cuda-core on a fake driver. NOT RUN ON HARDWARE.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.types import UInt8
from service.engines.base import BackendError
from service.errors import DeviceError

if TYPE_CHECKING:
    from cuda.core import Device, Event, Stream
    from cuda.core.graph import Graph


RECORDING = threading.RLock()
"""Held while any engine of the process records a graph, and while memory is allocated or freed.

ONNX Runtime records in CUDA's global mode, in which an allocation in any thread makes the recording
fail, and the allocation too: a new version is warmed up while another one is served.
"""


class CudaError(BackendError):
    """CUDA refuses or fails; the message says at what."""


@dataclass(eq=False)
class DeviceMemory:
    """An allocation on the device.

    Attributes:
        pointer: Its address.
        size_bytes: Its size.
        owner: The cuda-core buffer, which frees it.
    """

    pointer: int
    size_bytes: int
    owner: Any


@dataclass(eq=False)
class PinnedMemory(DeviceMemory):
    """An allocation on the host that the device copies from and to.

    Attributes:
        array: [size_bytes], the same memory.
    """

    array: UInt8


@contextmanager
def cuda_errors(what: str) -> Iterator[None]:
    """Turns errors of CUDA and its libraries into a `CudaError`; says what could not be done."""
    try:
        yield
    except (BackendError, DeviceError):
        raise
    except Exception as error:  # cuda-core's exceptions have no common base
        raise CudaError(f"CUDA cannot {what}: {error}") from error


class CudaDevice:
    """A GPU. Any thread may call the methods after it has called `activate`.

    Args:
        device_id: Ordinal of the GPU.

    Raises:
        CudaError: The driver refuses; the message says why.
    """

    def __init__(self, device_id: int = 0) -> None:
        self.device_id = device_id
        try:
            from cuda.core import (
                Buffer,
                Device,
                EventOptions,
                LegacyPinnedMemoryResource,
                StreamOptions,
            )
        except ImportError as error:
            text = f"cuda-core cannot be imported (extra gpu-kernels): {error}"
            raise CudaError(text) from error
        with cuda_errors(f"use device {device_id}"):
            self._devices = Device
            self._view = Buffer.from_handle
            self._device().set_current()
            self._pinned = LegacyPinnedMemoryResource()
        self._stream_options, self._event_options = StreamOptions, EventOptions(blocking_sync=True)
        self._lock = threading.Lock()
        self._streams: dict[int, Stream] = {}
        self._ends: dict[int, Event] = {}
        self._allocating = self.open_stream()

    def _device(self) -> Device:
        """cuda-core's object for the calling thread; each thread has its own."""
        return self._devices(self.device_id)

    def activate(self) -> None:
        """Makes this GPU the calling thread's device."""
        with cuda_errors(f"use device {self.device_id}"):
            self._device().set_current()

    def open_stream(self, priority: int = 0) -> int:
        """Handle of a new stream, which does not wait for the default one.

        Args:
            priority: 0 is the lowest; the kernels of -1 go before those that are waiting.
        """
        with cuda_errors("open a stream"):
            options = self._stream_options(priority=priority)
            stream = self._device().create_stream(options=options)
            handle = int(stream.handle)
        with self._lock:
            self._streams[handle] = stream
        return handle

    def close_stream(self, stream: int) -> None:
        """Closes a stream of `open_stream`."""
        with self._lock:
            owned = self._streams.pop(stream)
            self._ends.pop(stream, None)
        with cuda_errors("close a stream"):
            owned.close()

    def stream(self, stream: int) -> Stream:
        """cuda-core's object of a stream of `open_stream`."""
        return self._streams[stream]

    def synchronize(self, stream: int) -> None:
        """Waits until everything that is queued on a stream is done.

        The thread sleeps meanwhile; waiting for a stream itself would keep its core busy. Only one
        thread at a time may wait for a stream.
        """
        with cuda_errors("finish what was queued"):
            end = self._ends[stream] = self.record(stream, self._ends.get(stream))
            end.sync()

    def allocate(self, size_bytes: int) -> DeviceMemory:
        """Memory on the device, usable on every stream at once."""
        with RECORDING, cuda_errors(f"allocate {size_bytes} bytes on the device"):
            stream = self._streams[self._allocating]
            buffer = self._device().allocate(size_bytes, stream=stream)
            stream.sync()  # only then may other streams use it
            return DeviceMemory(int(buffer.handle), size_bytes, buffer)

    def allocate_pinned(self, size_bytes: int) -> PinnedMemory:
        """Pinned memory on the host."""
        with RECORDING, cuda_errors(f"allocate {size_bytes} pinned bytes"):
            buffer = self._pinned.allocate(size_bytes)
            pointer = int(buffer.handle)
            raw = (ctypes.c_uint8 * size_bytes).from_address(pointer)
            return PinnedMemory(pointer, size_bytes, buffer, np.ctypeslib.as_array(raw))

    def free(self, memory: DeviceMemory) -> None:
        """Frees memory that no stream uses any more."""
        with RECORDING, cuda_errors(f"free {memory.size_bytes} bytes"):
            memory.owner.close()

    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """Queues a copy between any two addresses of device or pinned memory."""
        with cuda_errors(f"copy {size_bytes} bytes"):
            self._view(target, size_bytes).copy_from(
                self._view(source, size_bytes), stream=self._streams[stream]
            )

    def record(self, stream: int, event: Event | None = None) -> Event:
        """Marks the end of what is queued on a stream, in a new event or in one used before."""
        with cuda_errors("record an event"):
            options = self._event_options if event is None else None
            return self._streams[stream].record(event, options)

    def wait(self, event: Event) -> None:
        """Waits until the stream has reached the event's last mark."""
        with cuda_errors("wait for an event"):
            event.sync()

    def capture(self, stream: int, work: Callable[[], object]) -> Graph:
        """Records what `work` queues on a stream as a CUDA graph; none of it runs.

        Raises:
            Exception: Whatever `work` raises, or CUDA where `work` does what cannot be recorded.
        """
        recorder = self._streams[stream].create_graph_builder()
        recorder.begin_building("thread_local")
        try:
            work()
        finally:
            recorder.end_building()
        return recorder.complete()

    def launch_graph(self, graph: Graph, stream: int) -> None:
        """Queues a recorded graph."""
        with cuda_errors("launch a graph"):
            graph.launch(self._streams[stream])
