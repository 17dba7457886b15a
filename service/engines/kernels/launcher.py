"""How kernels are launched: on a GPU through cuda-core, or by the tests on the host.

All that the kernels' callers know of a device is `Launcher`: raw addresses, raw streams, copies and
launches. So the path that runs on a GPU, with its sizes, offsets and retries, is the path that runs
in the tests. NOT RUN ON HARDWARE: nobody has run `CudaLauncher` on a GPU yet.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pipeline.types import UInt8
from service.engines.base import BackendError

BLOCK = 128
"""Threads of a block, all along x."""

SIGNATURES: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(
        ("pack_bits_float32", "pack_bits_float16", "pack_bits_bfloat16"), ("select", "ppppppiiif")
    ),
    "measure_masks": ("select", "pppppiii"),
    "compare_masks": ("select", "ppppppiii"),
    "matrix_compensate": ("select", "ppi"),
    "matrix_decay": ("select", "pppppiif"),
    "mark_overlaps": ("select", "ppif"),
    "greedy_nms": ("select", "pppppii"),
    "rank_survivors": ("select", "ppppif"),
    "axis_taps": ("paste", "piiiiiii"),
    "paste_spans": ("paste", "pppppiii"),
    **dict.fromkeys(
        ("count_edges_float32", "count_edges_float16", "count_edges_bfloat16"),
        ("paste", "ppppppf"),
    ),
    "sum_columns": ("paste", "pppi"),
    "place_edges": ("paste", "pppii"),
    **dict.fromkeys(
        ("emit_edges_float32", "emit_edges_float16", "emit_edges_bfloat16"),
        ("paste", "pppppppppfu"),
    ),
    "measure_runs": ("runs", "pppiiu"),
    "place_bytes": ("runs", "pppi"),
    "write_runs": ("runs", "ppppiiu"),
    "letterbox": ("letterbox", "ppliiiiidd"),
}
"""Of each kernel its source and its arguments' types, letters of `ARGUMENTS`."""

ARGUMENTS: Mapping[str, Any] = {
    "p": ctypes.c_uint64,
    "i": ctypes.c_int32,
    "u": ctypes.c_uint32,
    "l": ctypes.c_int64,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
}


@dataclass(eq=False)
class Memory:
    """An allocation on the device.

    Attributes:
        pointer: Its address.
        size_bytes: Its size.
        owner: What keeps it.
    """

    pointer: int
    size_bytes: int
    owner: Any


@dataclass(eq=False)
class HostMemory(Memory):
    """An allocation on the host that the device copies from and to.

    Attributes:
        array: [size_bytes], the same memory.
    """

    array: UInt8


class Launcher(Protocol):
    """A device. Every method may be called by any thread after `activate` in that thread."""

    def activate(self) -> None:
        """Makes the device the calling thread's."""
        ...

    def open_stream(self) -> int:
        """A new stream."""
        ...

    def close_stream(self, stream: int) -> None:
        """Ends a stream of `open_stream`."""
        ...

    def synchronize(self, stream: int) -> None:
        """Waits until a stream is done."""
        ...

    def allocate(self, size_bytes: int) -> Memory:
        """Memory on the device, usable on every stream at once."""
        ...

    def allocate_host(self, size_bytes: int) -> HostMemory:
        """Pinned memory on the host."""
        ...

    def free(self, memory: Memory) -> None:
        """Gives memory back that no stream uses any more."""
        ...

    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """Queues a copy between any two addresses of device or pinned memory."""
        ...

    def launch(
        self, kernel: str, threads: tuple[int, int, int], arguments: Sequence[float], stream: int
    ) -> None:
        """Queues a kernel.

        Args:
            kernel: A name in `SIGNATURES`.
            threads: Along x, in blocks of `BLOCK`, and blocks along y and z.
            arguments: Addresses and numbers.
            stream: Where it is queued.
        """
        ...


def grid_of(threads: tuple[int, int, int]) -> tuple[int, int, int]:
    """Blocks along each axis.

    Raises:
        BackendError: More than CUDA allows, or nothing.
    """
    x, y, z = threads
    if min(threads) < 1 or y > 65535 or z > 65535:
        raise BackendError(f"a kernel cannot have {threads} threads and blocks")
    return -(-x // BLOCK), y, z


def typed_arguments(kernel: str, arguments: Sequence[float]) -> list[Any]:
    """Arguments as the C types that the kernel declares.

    Raises:
        BackendError: Their number is wrong.
    """
    types = SIGNATURES[kernel][1]
    if len(types) != len(arguments):
        raise BackendError(f"{kernel} takes {len(types)} arguments, not {len(arguments)}")
    return [ARGUMENTS[t](a) for t, a in zip(types, arguments, strict=True)]


@contextmanager
def _as_backend_error(what: str) -> Iterator[None]:
    try:
        yield
    except BackendError:
        raise
    except Exception as error:  # cuda-core's exceptions have no common base
        raise BackendError(f"CUDA cannot {what}: {error}") from error


class CudaLauncher:
    """A GPU through cuda-core, and the kernels' code on it.

    Args:
        device_id: Ordinal of the GPU.
        cubins: Machine code of each source in `SIGNATURES`.

    Raises:
        BackendError: The driver refuses; the message says why.
    """

    def __init__(self, device_id: int, cubins: Mapping[str, bytes]) -> None:
        with _as_backend_error(f"load the kernels on device {device_id}"):
            import cuda.core as core

            self._core: Any = core
            self._device: Any = core.Device
            self._device_id = device_id
            self.activate()
            self._pinned: Any = core.LegacyPinnedMemoryResource()
            self._modules: dict[str, Any] = {
                name: core.ObjectCode.from_cubin(code, name=name) for name, code in cubins.items()
            }
            self._kernels: dict[str, Any] = {
                kernel: self._modules[source].get_kernel(kernel)
                for kernel, (source, _) in SIGNATURES.items()
            }
            self._lock = threading.Lock()
            self._streams: dict[int, Any] = {}
            self._allocating = self.open_stream()

    def activate(self) -> None:
        """See `Launcher.activate`."""
        with _as_backend_error(f"use device {self._device_id}"):
            self._device(self._device_id).set_current()

    def open_stream(self) -> int:
        """See `Launcher.open_stream`."""
        with _as_backend_error("open a stream"):
            stream = self._device(self._device_id).create_stream()
            handle = int(stream.handle)
        with self._lock:
            self._streams[handle] = stream
        return handle

    def close_stream(self, stream: int) -> None:
        """See `Launcher.close_stream`."""
        with self._lock:
            owned = self._streams.pop(stream)
        with _as_backend_error("close a stream"):
            owned.close()

    def _stream(self, stream: int) -> Any:
        owned = self._streams.get(stream)
        return self._core.Stream.from_handle(stream) if owned is None else owned

    def synchronize(self, stream: int) -> None:
        """See `Launcher.synchronize`."""
        with _as_backend_error("finish what was queued"):
            self._stream(stream).sync()

    def allocate(self, size_bytes: int) -> Memory:
        """See `Launcher.allocate`."""
        with _as_backend_error(f"allocate {size_bytes} bytes on the device"):
            stream = self._stream(self._allocating)
            buffer = self._device(self._device_id).allocate(size_bytes, stream=stream)
            stream.sync()  # from here on it may be used on other streams
            return Memory(int(buffer.handle), size_bytes, buffer)

    def allocate_host(self, size_bytes: int) -> HostMemory:
        """See `Launcher.allocate_host`."""
        with _as_backend_error(f"allocate {size_bytes} pinned bytes"):
            buffer = self._pinned.allocate(size_bytes)
            pointer = int(buffer.handle)
            raw = (ctypes.c_uint8 * size_bytes).from_address(pointer)
            return HostMemory(pointer, size_bytes, buffer, np.ctypeslib.as_array(raw))

    def free(self, memory: Memory) -> None:
        """See `Launcher.free`."""
        with _as_backend_error(f"free {memory.size_bytes} bytes"):
            memory.owner.close()

    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """See `Launcher.copy`."""
        with _as_backend_error(f"copy {size_bytes} bytes"):
            view = self._core.Buffer.from_handle
            view(target, size_bytes).copy_from(
                view(source, size_bytes), stream=self._stream(stream)
            )

    def launch(
        self, kernel: str, threads: tuple[int, int, int], arguments: Sequence[float], stream: int
    ) -> None:
        """See `Launcher.launch`."""
        typed = typed_arguments(kernel, arguments)
        with _as_backend_error(f"launch {kernel}"):
            config = self._core.LaunchConfig(grid=grid_of(threads), block=BLOCK)
            self._core.launch(self._stream(stream), config, self._kernels[kernel], *typed)
