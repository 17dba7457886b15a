"""Scratch memory and a stream for one caller at a time, reused by the next."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from service.engines.base import BackendError
from service.engines.kernels.launcher import HostMemory, Launcher, Memory

LEAST_BYTES = 1 << 12


def _rounded(size_bytes: int) -> int:
    """The next power of two, so that sizes that creep up allocate seldom."""
    return max(LEAST_BYTES, 1 << (size_bytes - 1).bit_length())


class Workspace:
    """Buffers by name, which only ever grow, and a stream of its own.

    A buffer may be asked for again, larger, once what was queued on it is done: its content is
    lost then.
    """

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._device: dict[str, Memory] = {}
        self._host: dict[str, HostMemory] = {}
        self.stream = launcher.open_stream()

    def device(self, name: str, size_bytes: int) -> int:
        """Address of at least so many bytes on the device."""
        memory = self._device.get(name)
        if memory is None or memory.size_bytes < size_bytes:
            if memory is not None:
                self._launcher.free(self._device.pop(name))
            memory = self._device[name] = self._launcher.allocate(_rounded(size_bytes))
        return memory.pointer

    def device_size(self, name: str) -> int:
        """Bytes that a buffer on the device has, 0 if there is none yet."""
        memory = self._device.get(name)
        return 0 if memory is None else memory.size_bytes

    def host(self, name: str, size_bytes: int) -> HostMemory:
        """At least so many pinned bytes on the host."""
        memory = self._host.get(name)
        if memory is None or memory.size_bytes < size_bytes:
            if memory is not None:
                self._launcher.free(self._host.pop(name))
            memory = self._host[name] = self._launcher.allocate_host(_rounded(size_bytes))
        return memory

    def close(self) -> None:
        """Frees everything; what is queued on its stream must be done."""
        for memory in (*self._device.values(), *self._host.values()):
            self._launcher.free(memory)
        self._device.clear()
        self._host.clear()
        self._launcher.close_stream(self.stream)


class WorkspacePool:
    """As many workspaces as there are callers at once; thread-safe."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._lock = threading.Lock()
        self._idle: list[Workspace] = []
        self._closed = False

    @contextmanager
    def borrow(self, stream: int | None = None) -> Iterator[Workspace]:
        """A workspace for the caller alone, with the device active in its thread.

        Whoever fails in between may have left work on the device: then it is waited for, and the
        workspace is freed.

        Args:
            stream: Where the caller queues its work; None for the workspace's own.
        """
        self._launcher.activate()
        with self._lock:
            workspace = self._idle.pop() if self._idle else None
        if workspace is None:
            workspace = Workspace(self._launcher)
        try:
            yield workspace
        except BaseException:
            with contextlib.suppress(BackendError):  # the first error is the one to tell
                self._launcher.synchronize(workspace.stream if stream is None else stream)
                workspace.close()
            raise
        with self._lock:
            if not self._closed:
                self._idle.append(workspace)
                return
        workspace.close()

    def close(self) -> None:
        """Frees what is idle now, and what is in use once it is given back."""
        with self._lock:
            idle, self._idle, self._closed = self._idle, [], True
        self._launcher.activate()
        for workspace in idle:
            workspace.close()
