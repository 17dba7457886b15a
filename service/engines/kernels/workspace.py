"""Scratch memory and a stream for one caller at a time, reused by the next."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from service.engines.base import BackendError
from service.engines.device import CudaDevice, DeviceMemory, PinnedMemory

LEAST_BYTES = 1 << 12
PRIORITY = -1
"""Of the streams: post-processing is short, and a thread and an engine's buffer wait for it."""


def _rounded(size_bytes: int) -> int:
    """The next power of two, so that slowly growing sizes rarely allocate."""
    return max(LEAST_BYTES, 1 << (size_bytes - 1).bit_length())


class Workspace:
    """Buffers by name, which only ever grow, and a stream of its own.

    A buffer that is requested with a larger size is allocated again and loses its content; nothing
    that is queued may still use it.
    """

    def __init__(self, device: CudaDevice) -> None:
        self._gpu = device
        self._device: dict[str, DeviceMemory] = {}
        self._host: dict[str, PinnedMemory] = {}
        self.stream = device.open_stream(PRIORITY)

    def device(self, name: str, size_bytes: int) -> int:
        """Address of at least `size_bytes` on the device."""
        memory = self._device.get(name)
        if memory is None or memory.size_bytes < size_bytes:
            if memory is not None:
                self._gpu.free(self._device.pop(name))
            memory = self._device[name] = self._gpu.allocate(_rounded(size_bytes))
        return memory.pointer

    def device_size(self, name: str) -> int:
        """Size of a buffer on the device, bytes; 0 before its first use."""
        memory = self._device.get(name)
        return 0 if memory is None else memory.size_bytes

    def host(self, name: str, size_bytes: int) -> PinnedMemory:
        """At least `size_bytes` of pinned memory on the host."""
        memory = self._host.get(name)
        if memory is None or memory.size_bytes < size_bytes:
            if memory is not None:
                self._gpu.free(self._host.pop(name))
            memory = self._host[name] = self._gpu.allocate_pinned(_rounded(size_bytes))
        return memory

    def close(self) -> None:
        """Frees everything; nothing may be queued on its stream any more."""
        for memory in (*self._device.values(), *self._host.values()):
            self._gpu.free(memory)
        self._device.clear()
        self._host.clear()
        self._gpu.close_stream(self.stream)


class WorkspacePool:
    """As many workspaces as there are concurrent callers; thread-safe."""

    def __init__(self, device: CudaDevice) -> None:
        self._gpu = device
        self._lock = threading.Lock()
        self._idle: list[Workspace] = []
        self._closed = False

    @contextmanager
    def borrow(self, stream: int | None = None) -> Iterator[Workspace]:
        """A workspace for the caller alone, with the device active in its thread.

        After an error in the block its stream is synchronised and the workspace is freed, because
        queued work may still use it.

        Args:
            stream: Where the caller queues its work; None for the workspace's own.
        """
        self._gpu.activate()
        with self._lock:
            workspace = self._idle.pop() if self._idle else None
        if workspace is None:
            workspace = Workspace(self._gpu)
        try:
            yield workspace
        except BaseException:
            with contextlib.suppress(BackendError):  # the first error is the one to report
                self._gpu.synchronize(workspace.stream if stream is None else stream)
                workspace.close()
            raise
        with self._lock:
            if not self._closed:
                self._idle.append(workspace)
                return
        workspace.close()

    def close(self) -> None:
        """Frees idle workspaces now, borrowed ones when they are returned."""
        with self._lock:
            idle, self._idle, self._closed = self._idle, [], True
        self._gpu.activate()
        for workspace in idle:
            workspace.close()
