from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.engines.state import EngineState
from service.observe.metrics import Metrics
from service.observe.version_series import KEPT_ENDED
from service.protocol import ModelState
from service.scale.cluster.metrics import FrontMetrics, report_front, report_worker
from service.scale.merged_metrics import Report
from tests.support.canvases import build_config

ENGINE = EngineState("onnxruntime", "cpu", "fp32", "asked for", None)


async def read(reports: list[Report], accept: str = "") -> tuple[dict[str, dict[str, float]], str]:
    """By sample and replica."""

    async def collect_all() -> list[Report]:
        return reports

    text, content_type = await FrontMetrics(collect_all).answer(accept)
    found: dict[str, dict[str, float]] = {}
    if "openmetrics" not in content_type:
        for family in text_string_to_metric_families(text.decode()):
            for sample in family.samples:
                found.setdefault(sample.name, {})[sample.labels["replica"]] = sample.value
    return found, content_type


async def test_each_family_stands_once_with_all_processes() -> None:
    one, other = Metrics(), Metrics()
    for metrics, images in ((one, 3), (other, 4)):
        metrics.add_model("blobs", 1, lambda: ENGINE, 8)
        metrics.images.labels("blobs", 1).inc(images)
    reports = [("a", (await report_worker(one))[1]), ("b", (await report_worker(other))[1])]
    found, content_type = await read(reports)
    assert content_type.startswith("text/plain")
    assert found["solo_images_total"] == {"a": 3, "b": 4}
    assert found["solo_engine_up"] == {"a": 1, "b": 1}
    assert set(found["process_resident_memory_bytes"]) == {"a", "b"}
    _, content_type = await read(reports, "application/openmetrics-text")
    assert content_type.startswith("application/openmetrics-text")


def test_a_front_shows_what_is_served_now_and_forgets_old_versions() -> None:
    front = FrontMetrics(lambda: pytest.fail("not asked"))
    config = build_config()
    for version in range(1, 20):
        served = config.model_copy(update={"version": version})
        front.describe_models([ModelState(served, ENGINE, 8)])
    assert list(front._engines) == [(config.name, 19)]
    versions = {
        sample.labels["version"]
        for metric in front._registry.collect()
        for sample in metric.samples
        if "version" in sample.labels and sample.name.startswith("solo_")
    }
    assert versions == {str(version) for version in range(19 - KEPT_ENDED, 20)}


async def test_fronts_count_requests_and_workers_images() -> None:
    front, worker = FrontMetrics(lambda: pytest.fail("not asked")), Metrics()
    for metrics in (front, worker):
        metrics.add_model("blobs", 1, lambda: ENGINE, 8)
        metrics.requests.labels("/segment", "POST", "200").inc()
        metrics.rejections.labels("queue_canvases").inc()
    front.retries.inc()
    found, _ = await read(
        [("f", (await report_front(front))[1]), ("w", (await report_worker(worker))[1])]
    )
    for name in ("solo_requests_total", "solo_rejections_total", "solo_cluster_retries_total"):
        assert set(found[name]) == {"f"}, name
    for name in ("solo_images_total", "solo_stage_duration_seconds_sum", "solo_model_info"):
        assert set(found[name]) == {"w"}, name
