"""Pinned and device memory and a stream for a slot of ONNX Runtime, through cuda-core.

Not run on hardware.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any, Protocol

import numpy as np

from pipeline.types import UInt8


class Region(Protocol):
    """Memory that the engine reads or writes; freed with the object."""

    @property
    def pointer(self) -> int:
        """Its address, for the engine."""
        ...

    @property
    def n_bytes(self) -> int:
        """Its size."""
        ...


class Staged(Region, Protocol):
    """Memory of the engine with a twin on the host."""

    @property
    def array(self) -> UInt8:
        """[n_bytes] uint8: the twin, free to be written until `upload`."""
        ...

    def upload(self, n_bytes: int) -> None:
        """Starts to copy the first bytes to the engine, in the order of the stream."""
        ...

    def wait(self) -> None:
        """Waits until the last upload is over, so that `array` may be written again."""
        ...


class Memory(Protocol):
    """Where a slot's buffers come from, and its stream; used by the slot's thread alone.

    Attributes:
        device: As ONNX Runtime calls it: "cpu" or "cuda".
        stream: Handle of the stream that copies and computations are ordered on.
    """

    device: str
    stream: int

    def allocate(self, n_bytes: int) -> Region:
        """Memory for outputs."""
        ...

    def stage(self, n_bytes: int) -> Staged:
        """Memory for inputs."""
        ...


class CudaMemory:
    """Plain allocations and a stream of its own on the first GPU; makes it the thread's device."""

    device = "cuda"

    def __init__(self) -> None:
        self._cuda: Any = importlib.import_module("cuda.core")
        self._device = self._cuda.Device(0)
        self._device.set_current()
        self._stream = self._device.create_stream()
        self._pinned = self._cuda.LegacyPinnedMemoryResource()
        self.stream = int(self._stream.handle)

    def allocate(self, n_bytes: int) -> Region:
        """See `Memory.allocate`."""
        return _CudaRegion(self._device.allocate(n_bytes, stream=self._stream))

    def stage(self, n_bytes: int) -> Staged:
        """See `Memory.stage`."""
        buffer = self._device.allocate(n_bytes, stream=self._stream)
        twin = self._pinned.allocate(n_bytes)
        return _CudaStaged(self._cuda.Buffer, buffer, twin, self._stream)


class _CudaRegion:
    def __init__(self, buffer: Any) -> None:
        self._buffer = buffer
        self.pointer = int(buffer.handle)
        self.n_bytes = int(buffer.size)


class _CudaStaged(_CudaRegion):
    def __init__(self, buffer_type: Any, buffer: Any, twin: Any, stream: Any) -> None:
        super().__init__(buffer)
        self._buffer_type = buffer_type
        self._twin = twin
        self._stream = stream
        self._uploaded: Any = None
        raw = (ctypes.c_uint8 * self.n_bytes).from_address(int(twin.handle))
        self.array: UInt8 = np.ctypeslib.as_array(raw)

    def upload(self, n_bytes: int) -> None:
        part = self._buffer_type.from_handle
        source = part(int(self._twin.handle), n_bytes, owner=self._twin)
        target = part(self.pointer, n_bytes, owner=self._buffer)
        target.copy_from(source, stream=self._stream)
        self._uploaded = self._stream.record(self._uploaded)

    def wait(self) -> None:
        if self._uploaded is not None:
            self._uploaded.sync()
