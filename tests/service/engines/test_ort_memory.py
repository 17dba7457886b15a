"""CUDA memory against a cuda-core that records what it is asked for; the real one needs a GPU."""

from __future__ import annotations

import ctypes
import inspect
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from service.engines.ort_memory import CudaMemory


class FakeBuffer:
    def __init__(self, log: list[Any], size: int) -> None:
        self.memory = (ctypes.c_uint8 * size)()
        self.handle, self.size, self._log = ctypes.addressof(self.memory), size, log


def install(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A cuda-core whose copies are done at once; returns the log of its calls."""
    log: list[Any] = []

    class Part:
        def __init__(self, pointer: int, size: int) -> None:
            self.pointer, self.size = pointer, size

        @classmethod
        def from_handle(cls, pointer: int, size: int, *, owner: FakeBuffer) -> Part:
            assert owner.handle <= pointer and pointer + size <= owner.handle + owner.size
            return cls(pointer, size)

        def copy_from(self, source: Part, *, stream: Any) -> None:
            log.append(("copy", source.size, self.size, stream.handle))
            ctypes.memmove(self.pointer, source.pointer, self.size)

    def record(event: Any) -> Any:
        log.append(("record", event is not None))
        return SimpleNamespace(sync=lambda: log.append("sync"))

    stream = SimpleNamespace(handle=99, record=record)
    device = SimpleNamespace(
        set_current=lambda: log.append("current"),
        create_stream=lambda: stream,
        allocate=lambda size, *, stream: FakeBuffer(log, size),
    )
    pinned = SimpleNamespace(allocate=lambda size: FakeBuffer(log, size))
    cuda = SimpleNamespace(
        Device=lambda ordinal: device,
        LegacyPinnedMemoryResource=lambda: pinned,
        Buffer=Part,
    )
    monkeypatch.setitem(sys.modules, "cuda.core", cuda)
    return log


def test_only_what_is_used_is_copied_on_the_slots_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    log = install(monkeypatch)
    memory = CudaMemory()
    assert (memory.device, memory.stream, log) == ("cuda", 99, ["current"])
    staged: Any = memory.stage(256)
    staged.wait()  # nothing is on its way
    staged.array[:] = np.arange(256)
    staged.upload(100)
    staged.wait()
    assert log[1:] == [("copy", 100, 100, 99), ("record", False), "sync"]
    arrived = ctypes.string_at(staged.pointer, 100)
    assert arrived == bytes(range(100))
    staged.upload(1)
    assert log[-1] == ("record", True)  # the same event again


def test_output_memory_is_as_large_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    region = CudaMemory().allocate(1024)
    assert region.n_bytes == 1024
    assert region.pointer


def test_the_real_cuda_core_has_what_is_called() -> None:
    cuda = pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    assert {"stream"} <= set(inspect.signature(cuda.Device.allocate).parameters)
    assert {"ptr", "size", "owner"} <= set(inspect.signature(cuda.Buffer.from_handle).parameters)
    assert {"src", "stream"} <= set(inspect.signature(cuda.Buffer.copy_from).parameters)
    assert "event" in inspect.signature(cuda.Stream.record).parameters
    assert callable(cuda.Event.sync)
    assert "size" in inspect.signature(cuda.LegacyPinnedMemoryResource.allocate).parameters
    assert inspect.signature(cuda.LegacyPinnedMemoryResource.allocate).parameters["size"]
