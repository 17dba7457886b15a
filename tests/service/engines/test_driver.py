from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from service.engines.driver import Gpu, count_gpus, find_gpu


def install(monkeypatch: pytest.MonkeyPatch, **status: int) -> None:
    """A driver of `count` GPUs whose functions return what `status` says, else 0."""

    def name(buffer: Any, size: int, device: ctypes.c_int) -> int:
        buffer.value = b"NVIDIA H100 80GB HBM3"
        return status.get("cuDeviceGetName", 0)

    def attribute(target: Any, which: int, device: ctypes.c_int) -> int:
        minor = status.get("minor_step", 0) * device.value
        target._obj.value = {75: 9, 76: minor}[which]
        return status.get("cuDeviceGetAttribute", 0)

    def get(target: Any, ordinal: int) -> int:
        target._obj.value = ordinal
        return status.get("cuDeviceGet", 0 if ordinal < status.get("count", 1) else 101)

    def count(target: Any) -> int:
        target._obj.value = status.get("count", 1)
        return status.get("cuDeviceGetCount", 0)

    driver = SimpleNamespace(
        cuInit=lambda flags: status.get("cuInit", 0),
        cuDeviceGet=get,
        cuDeviceGetCount=count,
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


def test_each_gpu_that_is_asked_for_must_be_there_and_of_one_architecture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, count=2)
    assert find_gpu((0, 1)) == Gpu("NVIDIA H100 80GB HBM3", "sm_90")
    assert find_gpu((0, 2)) == "the NVIDIA driver offers no GPU 2 (cuDeviceGet: CUDA error 101)"
    assert count_gpus() == 2
    install(monkeypatch, count=2, minor_step=1)
    found = find_gpu((0, 1))
    assert isinstance(found, str)
    assert found.startswith("GPUs of several architectures cannot be used by one process: ")
    assert "(sm_90)" in found and "(sm_91)" in found


@pytest.mark.parametrize("function", ["cuInit", "cuDeviceGetCount"])
def test_without_a_gpu_none_is_counted(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    install(monkeypatch, **{function: 100})
    assert count_gpus() == 0


def test_no_driver_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(library: str) -> None:
        raise OSError(f"{library}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert count_gpus() == 0
    assert find_gpu() == (
        "there is no NVIDIA driver here (libcuda.so.1: cannot open shared object file)"
    )
