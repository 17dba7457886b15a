from __future__ import annotations

import re
import sys

import pytest

from service.observe.gpus import GpuCollector, find_gpus
from service.observe.metrics import Metrics
from tests.support.fake_nvml import GIB, FakeNvml


async def render(metrics: Metrics) -> dict[str, float]:
    """The GPU samples of a scrape."""
    text = (await metrics.answer(""))[0].decode()
    lines = re.findall(r"^(solo_gpu_\S+) (\S+)$", text, re.M)
    return {name: float(value) for name, value in lines}


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


async def test_each_gpu_is_shown_in_base_units(nvml: FakeNvml) -> None:
    metrics = Metrics()
    metrics.watch_gpus(find_gpus())
    first, second = ('{index="0",uuid="GPU-100"}', '{index="1",uuid="GPU-101"}')
    assert await render(metrics) == {
        f"solo_gpu_memory_used_bytes{first}": GIB,
        f"solo_gpu_memory_used_bytes{second}": 2 * GIB,
        f"solo_gpu_memory_total_bytes{first}": 80 * GIB,
        f"solo_gpu_memory_total_bytes{second}": 80 * GIB,
        f"solo_gpu_utilization_ratio{first}": 0.25,  # the second GPU does not support this sensor
        f"solo_gpu_power_watts{first}": 350.5,
        f"solo_gpu_power_watts{second}": 350.5,
        f"solo_gpu_temperature_celsius{first}": 61.0,
        f"solo_gpu_temperature_celsius{second}": 61.0,
    }


async def test_gpus_are_only_read_when_the_metrics_are_scraped(nvml: FakeNvml) -> None:
    metrics = Metrics()
    metrics.watch_gpus(find_gpus())
    assert nvml.reads == 0
    await render(metrics)
    assert nvml.reads > 0


async def test_a_lost_driver_removes_only_the_gpu_samples(
    nvml: FakeNvml,
) -> None:
    metrics = Metrics()
    metrics.watch_gpus(find_gpus())
    assert await render(metrics)
    nvml.is_lost = True
    assert await render(metrics) == {}
    assert b"solo_ready" in (await metrics.answer(""))[0]


@pytest.mark.parametrize("module", [FakeNvml(missing=True), None], ids=["no driver", "no package"])
async def test_without_a_gpu_there_are_no_gpu_metrics(
    module: FakeNvml | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert find_gpus() is None
    metrics = Metrics()
    metrics.watch_gpus(find_gpus())
    assert await render(metrics) == {}


def test_the_fake_has_only_functions_of_the_real_module() -> None:
    real = pytest.importorskip("pynvml")
    names = [name for name in vars(FakeNvml) if name.lower().startswith("nvml")]
    assert len(names) > 5
    assert [name for name in names if not hasattr(real, name)] == []


async def test_the_collector_exports_the_last_values(nvml: FakeNvml) -> None:
    collector = GpuCollector(nvml)
    assert list(collector.collect()) == []
    collector.read()
    assert len(list(collector.collect())) == 5
