"""Queries the NVIDIA driver for a GPU through its C library, without any package.

This comes first, so that a machine without a GPU is detected in milliseconds and loads none of the
large CUDA libraries.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_DRIVER = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process may use.

    Attributes:
        name: From the driver.
        target: Its architecture, e.g. "sm_90".
    """

    name: str
    target: str


def find_gpu(ordinals: Sequence[int] = (0,)) -> Gpu | str:
    """The GPUs of these ordinals as the first one, or one sentence why they cannot be used.

    All must have one architecture: a model's packages and kernels are made for one.
    """
    try:
        driver: Any = ctypes.CDLL(_DRIVER)
    except OSError as error:
        return f"there is no NVIDIA driver here ({error})"
    found: list[Gpu] = []
    for ordinal in ordinals:
        gpu = _find_one(driver, ordinal)
        if not isinstance(gpu, Gpu):
            return gpu
        found.append(gpu)
    if len({gpu.target for gpu in found}) > 1:
        shown = ", ".join(f"{gpu.name} ({gpu.target})" for gpu in found)
        return f"GPUs of several architectures cannot be used by one process: {shown}"
    return found[0]


def count_gpus() -> int:
    """GPUs that this process may use; 0 where there is no driver."""
    try:
        driver: Any = ctypes.CDLL(_DRIVER)
    except OSError:
        return 0
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def _find_one(driver: Any, ordinal: int) -> Gpu | str:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    calls: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("cuInit", (0,)),
        ("cuDeviceGet", (ctypes.byref(device), ordinal)),
        ("cuDeviceGetName", (name, len(name), device)),
        ("cuDeviceGetAttribute", (ctypes.byref(major), _MAJOR, device)),
        ("cuDeviceGetAttribute", (ctypes.byref(minor), _MINOR, device)),
    )
    for function, arguments in calls:
        status = getattr(driver, function)(*arguments)
        if status:
            which = f" {ordinal}" if ordinal else ""
            return f"the NVIDIA driver offers no GPU{which} ({function}: CUDA error {status})"
    return Gpu(name.value.decode(errors="replace"), f"sm_{major.value}{minor.value}")
