"""A `cuda.core` whose device memory is the host's: copies are real, a graph replays what it took.

Only what our sources call, which tests/service/engines/test_trt_api.py holds against the real one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import numpy as np


class Capability(NamedTuple):
    major: int
    minor: int


class Buffer:
    def __init__(self, address: int, size: int, owner: object) -> None:
        self.handle = address
        self.size = size
        self.owner = owner
        self.closed = False

    @classmethod
    def from_handle(cls, ptr: int, size: int, mr: None = None, owner: object = None) -> Buffer:
        return cls(ptr, size, owner)

    def copy_from(self, src: Buffer, *, stream: Stream) -> None:
        assert src.size == self.size, "cuda-core copies whole buffers of one size"
        stream.put(lambda: ctypes.memmove(self.handle, src.handle, self.size))

    def close(self) -> None:
        self.closed = True


def allocate(size: int) -> Buffer:
    """Memory filled with a poison, so that nothing may count on zeros."""
    memory = np.full(size, 0xA5, np.uint8)
    return Buffer(memory.ctypes.data, size, memory)


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
        if not self.stream.cuda.graphs_work:
            raise RuntimeError("this stream cannot be captured")
        self.stream.recorder = self

    def end_building(self) -> None:
        self.stream.recorder = None

    def complete(self) -> Graph:
        graph = Graph(self.steps)
        self.stream.cuda.graphs.append(graph)
        return graph


class Stream:
    """Runs what is put on it at once, or records it."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.handle = 1000 + len(cuda.streams)
        self.recorder: Recorder | None = None
        cuda.streams.append(self)

    def put(self, step: Callable[[], object]) -> None:
        if self.recorder is not None:
            self.recorder.steps.append(step)
        else:
            step()

    def sync(self) -> None:
        assert self.recorder is None, "a stream that is captured cannot be waited for"

    def create_graph_builder(self) -> Recorder:
        return Recorder(self)

    def close(self) -> None:
        pass


class FakeCuda:
    """The module `cuda.core`, and what happened in it."""

    def __init__(self) -> None:
        self.graphs_work = True
        self.streams: list[Stream] = []
        self.buffers: list[Buffer] = []
        self.graphs: list[Graph] = []
        self.module = self._build_module()

    def find_stream(self, handle: int) -> Stream:
        return next(stream for stream in self.streams if stream.handle == handle)

    def _build_module(self) -> ModuleType:
        cuda = self

        class Device:
            device_id = 0
            name = "Fake GPU"
            compute_capability = Capability(9, 0)

            def __init__(self, device_id: int | None = None) -> None:
                pass

            def set_current(self) -> None:
                pass

            def create_stream(self) -> Stream:
                return Stream(cuda)

            def allocate(self, size: int, *, stream: Stream) -> Buffer:
                cuda.buffers.append(allocate(size))
                return cuda.buffers[-1]

        class LegacyPinnedMemoryResource:
            def allocate(self, size: int) -> Buffer:
                cuda.buffers.append(allocate(size))
                return cuda.buffers[-1]

        system = ModuleType("cuda.core.system")
        system.__dict__["get_user_mode_driver_version"] = lambda: (13, 0)
        module = ModuleType("cuda.core")
        module.__dict__.update(
            Device=Device,
            Buffer=Buffer,
            LegacyPinnedMemoryResource=LegacyPinnedMemoryResource,
            system=system,
        )
        return module
