"""A stand-in for pynvml: two GPUs, of which the second tells no utilisation."""

from __future__ import annotations

from types import SimpleNamespace

GIB = 1024**3


class NVMLError(Exception):
    """As pynvml's."""


class FakeNvml:
    """The functions that the server calls, with the real ones' names and units.

    Attributes:
        is_lost: The driver has gone; every call fails.
        missing: There is no driver: initialising fails.
        reads: Calls of sensors so far.
    """

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, *, missing: bool = False) -> None:
        self.missing = missing
        self.is_lost = False
        self.reads = 0

    def nvmlInit(self) -> None:
        if self.missing:
            raise NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        if self.is_lost:
            raise NVMLError("GPU is lost")
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return 100 + index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        self.reads += 1
        return SimpleNamespace(total=80 * GIB, used=(handle - 99) * GIB, free=0)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        if handle == 101:
            raise NVMLError("Not Supported")
        return SimpleNamespace(gpu=25, memory=3)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return 350_500

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        assert sensor == self.NVML_TEMPERATURE_GPU
        return 61
