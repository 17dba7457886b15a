"""The CUDA kernels compiled for the host, and a launcher that runs them there.

Device memory is host memory, filled with 0xFF when it is allocated, so that a kernel which reads
what it has not written fails.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.types import UInt8
from service.engines.kernels.launcher import (
    BLOCK,
    SIGNATURES,
    CudaLauncher,
    HostMemory,
    Launcher,
    Memory,
    grid_of,
    typed_arguments,
)
from service.engines.kernels.nvrtc import KERNELS, SOURCES, default_cache, load_cubins
from service.engines.kernels.postprocessor import find_obstacle

SUPPORT = Path(__file__).parent
COMPILER = "g++"


def has_compiler() -> bool:
    """Whether the kernels can be compiled for the host."""
    return shutil.which(COMPILER) is not None


def build_library(folder: Path) -> Path:
    """Compiles all sources for the host into a shared library."""
    lines = ['#include "kernel_host.h"']
    lines += [f'#include "{name}.cu"' for name in SOURCES]
    lines += [f"REGISTER({kernel})" for kernel in SIGNATURES]
    source, library = folder / "kernels.cpp", folder / "kernels.so"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [COMPILER, "-O2", "-ffp-contract=off", "-std=c++17", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unused-function", "-shared", "-fPIC", f"-I{SUPPORT}", f"-I{KERNELS}"]
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    return library


class HostLauncher:
    """Implements `Launcher` on the host; counts what is open.

    Attributes:
        memory: What is allocated.
        streams: What is open.
        launched: Names of the kernels that ran.
        fail_at: The kernel at which a launch raises `failure`, if any.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._lock = threading.Lock()
        self._next_stream = 1
        self.memory: dict[int, Memory] = {}
        self.streams: set[int] = set()
        self.launched: list[str] = []
        self.fail_at: str | None = None
        self.failure: BaseException = RuntimeError("not set")

    def activate(self) -> None:
        """Nothing to do."""

    def open_stream(self) -> int:
        with self._lock:
            self._next_stream += 1
            self.streams.add(self._next_stream)
            return self._next_stream

    def close_stream(self, stream: int) -> None:
        with self._lock:
            self.streams.remove(stream)

    def synchronize(self, stream: int) -> None:
        assert stream in self.streams

    def allocate(self, size_bytes: int) -> Memory:
        return self.allocate_host(size_bytes)

    def allocate_host(self, size_bytes: int) -> HostMemory:
        array = np.full(size_bytes, 0xFF, np.uint8)
        memory = HostMemory(array.ctypes.data, size_bytes, array, array)
        with self._lock:
            self.memory[memory.pointer] = memory
        return memory

    def free(self, memory: Memory) -> None:
        with self._lock:
            del self.memory[memory.pointer]
        memory.owner.fill(0xFF)  # whoever still reads it must not find what was there

    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        assert stream in self.streams
        ctypes.memmove(target, source, size_bytes)

    def launch(
        self, kernel: str, threads: tuple[int, int, int], arguments: Sequence[float], stream: int
    ) -> None:
        assert stream in self.streams
        if kernel == self.fail_at:
            raise self.failure
        typed: list[Any] = typed_arguments(kernel, arguments)
        pointers = (ctypes.c_void_p * len(typed))(*(ctypes.addressof(a) for a in typed))
        grid = (ctypes.c_uint * 3)(*grid_of(threads))
        run = getattr(self._library, f"run_{kernel}")
        assert run(grid, ctypes.c_uint(BLOCK), pointers, ctypes.c_uint(len(typed))) == 0, kernel
        self.launched.append(kernel)


class PoisonedGpu(CudaLauncher):
    """A GPU whose memory is filled with 0xFF when it is allocated."""

    def allocate(self, size_bytes: int) -> Memory:
        memory = super().allocate(size_bytes)
        poison = self.allocate_host(size_bytes)
        poison.array.fill(0xFF)
        stream = self.open_stream()
        self.copy(memory.pointer, poison.pointer, size_bytes, stream)
        self.synchronize(stream)
        self.close_stream(stream)
        self.free(poison)
        return memory


@functools.cache
def load_gpu() -> PoisonedGpu | str:
    """The first GPU with the kernels on it, or why there is none."""
    obstacle = find_obstacle()
    if obstacle is not None:
        return obstacle
    from cuda.core import Device

    capability = Device(0).compute_capability
    cubins = load_cubins((capability.major, capability.minor), cache=default_cache(), prebuilt=())
    return PoisonedGpu(0, cubins)


class Uploads:
    """Arrays on a launcher's device, for a test.

    Args:
        launcher: Of the host or of a GPU.
    """

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        launcher.activate()
        self.stream = launcher.open_stream()
        self._memory: list[Memory] = []

    def put(self, array: np.ndarray[Any, Any]) -> int:
        """Address of a copy of an array."""
        memory, host = self._allocate(array.nbytes)
        host.array[:] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        self._copy(memory.pointer, host.pointer, array.nbytes)
        return memory.pointer

    def poisoned(self, size_bytes: int) -> int:
        """Address of bytes that are all 0xFF."""
        return self.put(np.full(size_bytes, 0xFF, np.uint8))

    def get(self, pointer: int, size_bytes: int) -> UInt8:
        """A copy of what lies at an address."""
        _, host = self._allocate(size_bytes)
        self._copy(host.pointer, pointer, size_bytes)
        return host.array.copy()

    def _allocate(self, size_bytes: int) -> tuple[Memory, HostMemory]:
        memory = self.launcher.allocate(size_bytes)
        host = self.launcher.allocate_host(size_bytes)
        self._memory += [memory, host]
        return memory, host

    def _copy(self, target: int, source: int, size_bytes: int) -> None:
        self.launcher.copy(target, source, size_bytes, self.stream)
        self.launcher.synchronize(self.stream)

    def close(self) -> None:
        """Frees everything."""
        for memory in self._memory:
            self.launcher.free(memory)
        self.launcher.close_stream(self.stream)
