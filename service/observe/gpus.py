"""GPU metrics from NVML: memory, utilisation, power, temperature.

nvidia-ml-py is optional, and the GPUs are queried only when the metrics are scraped. Not run on
hardware.
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
    """A metric of a GPU: `read(nvml, handle)` returns it in the unit of the name."""

    name: str
    text: str
    read: Callable[[Any, Any], float]


_SENSORS = (
    _Sensor(
        "solo_gpu_memory_used_bytes",
        "GPU memory in use by all processes",
        lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
    ),
    _Sensor(
        "solo_gpu_memory_total_bytes",
        "Total memory of the GPU",
        lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).total,
    ),
    _Sensor(
        "solo_gpu_utilization_ratio",
        "Share of the driver's last sampling period in which a kernel ran, 0..1",
        lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
    ),
    _Sensor(
        "solo_gpu_power_watts",
        "Power draw of the GPU",
        lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
    ),
    _Sensor(
        "solo_gpu_temperature_celsius",
        "Temperature of the GPU",
        lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    ),
)


class GpuCollector(Collector):
    """Exports the values of the last `read`, labelled with index and UUID of the GPU.

    Args:
        nvml: The module `pynvml`, initialised.
    """

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._values: dict[str, dict[tuple[str, str], float]] = {}

    def read(self) -> None:
        """Queries every GPU; values a GPU does not support are omitted. May take milliseconds."""
        nvml = self._nvml
        values: dict[str, dict[tuple[str, str], float]] = {}
        try:
            gpus = []
            for index in range(nvml.nvmlDeviceGetCount()):
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                gpus.append((handle, (str(index), nvml.nvmlDeviceGetUUID(handle))))
        except nvml.NVMLError as error:
            logger.debug("NVML failed: %s", error)
            gpus = []
        for handle, labels in gpus:
            for sensor in _SENSORS:
                try:
                    value = sensor.read(nvml, handle)
                except nvml.NVMLError as error:  # e.g. utilisation of a GPU with MIG enabled
                    logger.debug("GPU %s does not report %s: %s", labels[0], sensor.name, error)
                else:
                    values.setdefault(sensor.name, {})[labels] = value
        self._values = values

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Yields one gauge family per sensor that has values."""
        values = self._values
        for sensor in _SENSORS:
            if sensor.name in values:
                family = GaugeMetricFamily(sensor.name, sensor.text, labels=["index", "uuid"])
                for labels, value in values[sensor.name].items():
                    family.add_metric(labels, value)
                yield family


def find_gpus() -> GpuCollector | None:
    """The collector, or None without a driver or without nvidia-ml-py."""
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except ImportError:
        logger.debug("no GPU metrics: nvidia-ml-py is not installed")
        return None
    except nvml.NVMLError as error:
        logger.debug("no GPU metrics: %s", error)
        return None
    return GpuCollector(nvml)
