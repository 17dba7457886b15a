"""The CUDA kernels compiled for the host, and a launcher that runs them there.

Device memory is filled with 0xFF when it is allocated, so that a kernel that reads what it has not
written fails.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from service.engines.device import CudaDevice, CudaError, DeviceMemory, PinnedMemory
from service.engines.kernels.launcher import (
    BLOCK,
    SIGNATURES,
    CudaLauncher,
    Launcher,
    grid_of,
    typed_arguments,
)
from service.engines.kernels.nvrtc import KERNELS, SOURCES, default_cache, load_cubins
from tests.support.fake_cuda import FakeCuda

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
    """Implements `Launcher` on the host: the service's `CudaDevice` over a fake `cuda.core`.

    Attributes:
        device: Its memory and streams.
        cuda: The fake, which knows what is open.
        launched: Names of the kernels that ran.
        fail_at: The kernel at which a launch raises `failure`, if any.
    """

    def __init__(self, library: Path, device: CudaDevice, cuda: FakeCuda) -> None:
        self._library = ctypes.CDLL(str(library))
        self.device = device
        self.cuda = cuda
        self.launched: list[str] = []
        self.fail_at: str | None = None
        self.failure: BaseException = RuntimeError("not set")

    def launch(
        self, kernel: str, threads: tuple[int, int, int], arguments: Sequence[float], stream: int
    ) -> None:
        if kernel == self.fail_at:
            raise self.failure
        typed: list[Any] = typed_arguments(kernel, arguments)
        grid = (ctypes.c_uint * 3)(*grid_of(threads))
        run = getattr(self._library, f"run_{kernel}")

        def step() -> None:
            pointers = (ctypes.c_void_p * len(typed))(*(ctypes.addressof(a) for a in typed))
            assert run(grid, ctypes.c_uint(BLOCK), pointers, ctypes.c_uint(len(typed))) == 0, kernel
            self.launched.append(kernel)

        self.cuda.streams[stream].put(step)


class PoisonedGpu(CudaDevice):
    """A GPU whose memory is filled with 0xFF when it is allocated."""

    def allocate(self, size_bytes: int) -> DeviceMemory:
        memory = super().allocate(size_bytes)
        poison = self.allocate_pinned(size_bytes)
        poison.array.fill(0xFF)
        stream = self.open_stream()
        self.copy(memory.pointer, poison.pointer, size_bytes, stream)
        self.synchronize(stream)
        self.close_stream(stream)
        self.free(poison)
        return memory


@functools.cache
def load_gpu() -> CudaLauncher | str:
    """The first GPU with the kernels on it, or why there is none."""
    try:
        device = PoisonedGpu()
    except CudaError as error:
        return str(error)
    from cuda.core import Device

    capability = Device(0).compute_capability
    cubins = load_cubins((capability.major, capability.minor), cache=default_cache(), prebuilt=())
    return CudaLauncher(device, cubins)


class Uploads:
    """Arrays on a launcher's device, for a test.

    Args:
        launcher: Of the host or of a GPU.
    """

    def __init__(self, launcher: Launcher) -> None:
        self.device = launcher.device
        self.device.activate()
        self.stream = self.device.open_stream()
        self._memory: list[DeviceMemory] = []

    def put(self, array: np.ndarray[Any, Any]) -> int:
        """Address of a copy of an array."""
        memory, host = self._allocate(array.nbytes)
        host.array[:] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        self._copy(memory.pointer, host.pointer, array.nbytes)
        return memory.pointer

    def _allocate(self, size_bytes: int) -> tuple[DeviceMemory, PinnedMemory]:
        memory = self.device.allocate(size_bytes)
        host = self.device.allocate_pinned(size_bytes)
        self._memory += [memory, host]
        return memory, host

    def _copy(self, target: int, source: int, size_bytes: int) -> None:
        self.device.copy(target, source, size_bytes, self.stream)
        self.device.synchronize(self.stream)

    def close(self) -> None:
        """Frees everything."""
        for memory in self._memory:
            self.device.free(memory)
        self.device.close_stream(self.stream)
