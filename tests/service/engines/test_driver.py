from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from service.engines.driver import Gpu, find_gpu


def install(monkeypatch: pytest.MonkeyPatch, **status: int) -> None:
    """A driver of a GPU of architecture 9.0 whose functions return what `status` says, else 0."""

    def name(buffer: Any, size: int, device: ctypes.c_int) -> int:
        buffer.value = b"NVIDIA H100 80GB HBM3"
        return status.get("cuDeviceGetName", 0)

    def attribute(target: Any, which: int, device: ctypes.c_int) -> int:
        target._obj.value = {75: 9, 76: 0}[which]
        return status.get("cuDeviceGetAttribute", 0)

    driver = SimpleNamespace(
        cuInit=lambda flags: status.get("cuInit", 0),
        cuDeviceGet=lambda target, ordinal: status.get("cuDeviceGet", 0),
        cuDeviceGetName=name,
        cuDeviceGetAttribute=attribute,
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda library: driver)


def test_a_gpu_is_named_with_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    assert find_gpu() == Gpu("NVIDIA H100 80GB HBM3", "sm_90")


@pytest.mark.parametrize(
    "function", ["cuInit", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute"]
)
def test_a_driver_without_a_gpu_says_at_which_step(
    monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    install(monkeypatch, **{function: 100})
    assert find_gpu() == f"the NVIDIA driver offers no GPU ({function}: CUDA error 100)"


def test_no_driver_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(library: str) -> None:
        raise OSError(f"{library}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert find_gpu() == (
        "there is no NVIDIA driver here (libcuda.so.1: cannot open shared object file)"
    )
