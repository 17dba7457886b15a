"""How kernels are launched: on a GPU through cuda-core, or by the tests on the host.

NOT RUN ON HARDWARE: the tests launch through the real cuda-core on a fake driver.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from service.engines.base import BackendError
from service.engines.device import CudaDevice, cuda_errors

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
}
"""Of each kernel its source and its arguments' types, letters of `ARGUMENTS`."""

ARGUMENTS: Mapping[str, Any] = {
    "p": ctypes.c_uint64,
    "i": ctypes.c_int32,
    "u": ctypes.c_uint32,
    "f": ctypes.c_float,
}


class Launcher(Protocol):
    """Launches the kernels on a device.

    Attributes:
        device: Its memory and streams.
    """

    device: CudaDevice

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


class CudaLauncher:
    """The kernels' machine code on a GPU.

    Args:
        device: The GPU; active in the calling thread.
        cubins: Machine code of each source in `SIGNATURES`.

    Raises:
        CudaError: The driver refuses the code.
    """

    def __init__(self, device: CudaDevice, cubins: Mapping[str, bytes]) -> None:
        self.device = device
        with cuda_errors(f"load the kernels on device {device.device_id}"):
            import cuda.core as core

            self._core: Any = core
            self._modules: dict[str, Any] = {
                name: core.ObjectCode.from_cubin(code, name=name) for name, code in cubins.items()
            }
            self._kernels: dict[str, Any] = {
                kernel: self._modules[source].get_kernel(kernel)
                for kernel, (source, _) in SIGNATURES.items()
            }

    def launch(
        self, kernel: str, threads: tuple[int, int, int], arguments: Sequence[float], stream: int
    ) -> None:
        """Queues a kernel; the device must be active in the calling thread.

        Raises:
            CudaError: The driver refuses the launch.
        """
        typed = typed_arguments(kernel, arguments)
        with cuda_errors(f"launch {kernel}"):
            config = self._core.LaunchConfig(grid=grid_of(threads), block=BLOCK)
            self._core.launch(self.device.stream(stream), config, self._kernels[kernel], *typed)
