"""What NVML says of the machine's GPUs, for the metrics: memory, utilisation, power, temperature.

The package nvidia-ml-py is imported only where it is asked for, and nothing is read before
somebody asks for the metrics. Not run on hardware.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Sensor:
    """A number of a GPU: `read(nvml, handle)` gives it in the name's unit."""

    name: str
    text: str
    read: Callable[[Any, Any], float]


_SENSORS = (
    _Sensor(
        "solo_gpu_memory_used_bytes",
        "Memory of the GPU in use, by whichever process",
        lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
    ),
    _Sensor(
        "solo_gpu_memory_total_bytes",
        "Memory of the GPU",
        lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).total,
    ),
    _Sensor(
        "solo_gpu_utilization_ratio",
        "Share of the driver's last sampling period in which a kernel ran, 0..1",
        lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
    ),
    _Sensor(
        "solo_gpu_power_watts",
        "Power that the GPU draws",
        lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
    ),
    _Sensor(
        "solo_gpu_temperature_celsius",
        "Temperature of the GPU",
        lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    ),
)


class GpuCollector(Collector):
    """Shows what was `read` last, for each GPU by its index and uuid.

    Args:
        nvml: The module pynvml, initialised.
    """

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._values: dict[str, dict[tuple[str, str], float]] = {}

    def read(self) -> None:
        """Asks every GPU; what one cannot tell is left out. May take milliseconds."""
        nvml = self._nvml
        values: dict[str, dict[tuple[str, str], float]] = {}
        try:
            gpus = []
            for index in range(nvml.nvmlDeviceGetCount()):
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                gpus.append((handle, (str(index), nvml.nvmlDeviceGetUUID(handle))))
        except nvml.NVMLError as error:
            logger.debug("NVML does not answer: %s", error)
            gpus = []
        for handle, labels in gpus:
            for sensor in _SENSORS:
                try:
                    value = sensor.read(nvml, handle)
                except nvml.NVMLError as error:  # e.g. no utilisation of a GPU that is split
                    logger.debug("GPU %s has no %s: %s", labels[0], sensor.name, error)
                else:
                    values.setdefault(sensor.name, {})[labels] = value
        self._values = values

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """See prometheus_client."""
        values = self._values
        for sensor in _SENSORS:
            if sensor.name in values:
                family = GaugeMetricFamily(sensor.name, sensor.text, labels=["index", "uuid"])
                for labels, value in values[sensor.name].items():
                    family.add_metric(labels, value)
                yield family


def find_gpus() -> GpuCollector | None:
    """The collector, or None where there is no GPU, no driver or no nvidia-ml-py."""
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except ImportError:
        logger.debug("no metrics of GPUs: nvidia-ml-py is not installed")
        return None
    except nvml.NVMLError as error:
        logger.debug("no metrics of GPUs: %s", error)
        return None
    return GpuCollector(nvml)
