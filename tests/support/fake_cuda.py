"""A `cuda.core` whose device memory is the host's, and whose streams run as late as CUDA's may.

What is queued on a stream runs only when somebody waits for the stream or for an event on it. So
code that reads a result, or writes into pinned memory, before it has waited, sees wrong data here
as it would on a GPU. Only what our sources call, which tests/service/engines/tensorrt/test_api.py
holds against the real one.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import itertools
import sys
import threading
from collections import deque
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

POISON = 0xFF
"""Fills new and freed memory, so that nothing may count on zeros; NaN as float32 and float16."""


class Capability(NamedTuple):
    major: int
    minor: int


class StreamOptions(NamedTuple):
    priority: int


class EventOptions(NamedTuple):
    blocking_sync: bool


class Buffer:
    def __init__(self, address: int, size: int, owner: Any = None) -> None:
        self.handle = address
        self.size = size
        self.owner = owner
        self.closed = False
        self.device = 0

    @classmethod
    def from_handle(cls, ptr: int, size: int, mr: None = None, owner: object = None) -> Buffer:
        return cls(ptr, size, owner)

    def copy_from(self, src: Buffer, *, stream: Stream) -> None:
        assert src.size == self.size, "cuda-core copies whole buffers of one size"
        stream.put(lambda: ctypes.memmove(self.handle, src.handle, self.size))

    def close(self) -> None:
        assert not self.closed, "a buffer is freed twice"
        self.closed = True
        self.owner.fill(POISON)


class Graph:
    def __init__(self, steps: list[Callable[[], object]]) -> None:
        self.steps = steps
        self.closed = False

    def launch(self, stream: Stream) -> None:
        assert not self.closed, "a closed graph was launched"
        for step in self.steps:
            stream.put(step)

    def close(self) -> None:
        self.closed = True


class Recorder:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.steps: list[Callable[[], object]] = []

    def begin_building(self, mode: str) -> None:
        assert mode == "thread_local"
        if not self.stream.cuda.graphs_work:
            raise RuntimeError("this stream cannot be captured")
        self.stream.recorder = self

    def end_building(self) -> None:
        self.stream.recorder = None

    def complete(self) -> Graph:
        graph = Graph(self.steps)
        self.stream.cuda.graphs.append(graph)
        return graph


class Event:
    def __init__(self, stream: Stream, options: EventOptions | None) -> None:
        assert options is not None and options.blocking_sync, "waiting would keep a core busy"
        self.stream = stream
        self.marks: list[bool] = []

    def sync(self) -> None:
        self.stream.check_wait()
        self.stream.cuda.waits += 1
        while not self.marks[-1]:
            self.stream.run_next()


class Stream:
    """Keeps what is put on it until somebody waits, or records it."""

    def __init__(self, cuda: FakeCuda, priority: int) -> None:
        self.cuda = cuda
        self.device: int = cuda.current_device
        self.priority = priority
        self.handle = next(cuda.handles)
        self.recorder: Recorder | None = None
        self.closed = False
        self._queued: deque[Callable[[], object]] = deque()
        cuda.streams[self.handle] = self

    def put(self, step: Callable[[], object]) -> None:
        self.cuda.check_thread(self.device)
        assert not self.closed, "a closed stream is used"
        if self.recorder is not None:
            self.recorder.steps.append(step)
        else:
            self._queued.append(step)

    @property
    def is_idle(self) -> bool:
        return not self._queued

    def run_next(self) -> None:
        self._queued.popleft()()

    def check_wait(self) -> None:
        self.cuda.check_thread(self.device)
        assert not self.closed, "a closed stream is used"
        assert self.recorder is None, "a stream that is captured cannot be waited for"

    def sync(self) -> None:
        """Only for tests and right after an allocation: it keeps a core busy."""
        self.check_wait()
        while self._queued:
            self.run_next()

    def record(self, event: Event | None = None, options: EventOptions | None = None) -> Event:
        event = event or Event(self, options)
        index = len(event.marks)
        event.marks.append(False)
        self.put(lambda: event.marks.__setitem__(index, True))
        return event

    def create_graph_builder(self) -> Recorder:
        return Recorder(self)

    def close(self) -> None:
        self.closed = True


class FakeCuda:
    """The module `cuda.core`, and what happened in it.

    Attributes:
        count: GPUs.
        broken: GPUs on which every call fails, as after an illegal address, until the process ends.
        graphs_work: Whether streams can be captured.
        memory_bytes: What may be allocated.
        streams: By handle, closed ones too.
        buffers, graphs: All that there were.
        waits: For events.
    """

    def __init__(self) -> None:
        self._thread = threading.local()
        self.count = 3
        self.broken: set[int] = set()
        self.graphs_work = True
        self.memory_bytes = 1 << 40
        self.handles = itertools.count(1000)
        self.streams: dict[int, Stream] = {}
        self.buffers: list[Buffer] = []
        self.graphs: list[Graph] = []
        self.waits = 0
        self.module = self._build_module()

    @property
    def open_buffers(self) -> set[int]:
        """Addresses of what is allocated."""
        return {buffer.handle for buffer in self.buffers if not buffer.closed}

    @property
    def open_streams(self) -> set[int]:
        return {stream.handle for stream in self.streams.values() if not stream.closed}

    @property
    def current_device(self) -> int:
        """The calling thread's; CUDA needs one in each thread."""
        assert hasattr(self._thread, "device"), "no device is current in this thread"
        current: int = self._thread.device
        self.check_works(current)
        return current

    def check_works(self, device: int) -> None:
        if device in self.broken:
            raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access")

    def check_thread(self, device: int) -> None:
        """What belongs to a device is used where it is current."""
        assert self.current_device == device, f"{self.current_device} is current, not {device}"

    def allocate(self, size: int) -> Buffer:
        device = self.current_device
        self.memory_bytes -= size
        if self.memory_bytes < 0:
            raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY")
        memory = np.full(size, POISON, np.uint8)
        self.buffers.append(Buffer(memory.ctypes.data, size, memory))
        self.buffers[-1].device = device
        return self.buffers[-1]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Makes `import cuda.core` give this module."""
        for name, module in (("cuda", ModuleType("cuda")), ("cuda.core", self.module)):
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            monkeypatch.setitem(sys.modules, name, module)

    def _build_module(self) -> ModuleType:
        cuda = self

        class Device:
            device_id = 0
            name = "Fake GPU"
            compute_capability = Capability(9, 0)

            def __init__(self, device_id: int | None = None) -> None:
                self.device_id = device_id or 0
                if self.device_id >= cuda.count:
                    raise ValueError(f"device_id must be within 0..{cuda.count - 1}")

            def set_current(self) -> None:
                cuda._thread.device = self.device_id
                cuda.check_works(self.device_id)

            def create_stream(self, *, options: StreamOptions) -> Stream:
                assert -5 <= options.priority <= 0, "out of the range of CUDA"
                return Stream(cuda, options.priority)

            def allocate(self, size: int, *, stream: Stream) -> Buffer:
                assert not stream.closed
                return cuda.allocate(size)

        class LegacyPinnedMemoryResource:
            def allocate(self, size: int) -> Buffer:
                return cuda.allocate(size)

        system = ModuleType("cuda.core.system")
        system.__dict__["get_user_mode_driver_version"] = lambda: (13, 0)
        module = ModuleType("cuda.core")
        module.__dict__.update(
            Device=Device,
            Buffer=Buffer,
            LegacyPinnedMemoryResource=LegacyPinnedMemoryResource,
            EventOptions=EventOptions,
            StreamOptions=StreamOptions,
            system=system,
        )
        return module


def read_memory(address: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """A copy of what lies at an address."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(ctypes.string_at(address, size), dtype).reshape(shape).copy()


def view_memory(address: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """What lies at an address, which must outlive the result."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = (ctypes.c_uint8 * size).from_address(address)
    return np.frombuffer(memoryview(memory), dtype).reshape(shape)
