"""Queries the NVIDIA driver for a GPU through its C library, without any package.

This comes first, so that a machine without a GPU is detected in milliseconds and loads none of the
large CUDA libraries.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

_DRIVER = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class Gpu:
    """The first GPU that this process may use.

    Attributes:
        name: From the driver.
        target: Its architecture, e.g. "sm_90".
    """

    name: str
    target: str


def find_gpu() -> Gpu | str:
    """The GPU, or one sentence why there is none."""
    try:
        driver: Any = ctypes.CDLL(_DRIVER)
    except OSError as error:
        return f"there is no NVIDIA driver here ({error})"
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    calls: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("cuInit", (0,)),
        ("cuDeviceGet", (ctypes.byref(device), 0)),
        ("cuDeviceGetName", (name, len(name), device)),
        ("cuDeviceGetAttribute", (ctypes.byref(major), _MAJOR, device)),
        ("cuDeviceGetAttribute", (ctypes.byref(minor), _MINOR, device)),
    )
    for function, arguments in calls:
        status = getattr(driver, function)(*arguments)
        if status:
            return f"the NVIDIA driver offers no GPU ({function}: CUDA error {status})"
    return Gpu(name.value.decode(errors="replace"), f"sm_{major.value}{minor.value}")
