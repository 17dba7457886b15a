"""The real Prometheus scrapes the real server and answers the dashboard's queries."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator

import httpx
import pytest

from tests.deploy.prometheus import Prometheus, run_prometheus
from tests.deploy.queries import dashboard_queries, load_rules
from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.server import run_server

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None,
    reason="prometheus is not installed (Debian: apt-get install prometheus)",
)

IMAGES = 12
# Series of what this test does not bring about.
MAY_BE_EMPTY = {
    "Refused and replaced",
    "Engines timed",  # there is only one for this CPU
    *("Agreement with the served version", "Images of shadows per second"),  # there is none
    *("Instances of shadows per second", "Score difference", "Shadows and verdicts"),
    *("GPU memory", "GPU utilisation", "GPU power", "GPU temperature"),  # there is none
}
QUERIES = dashboard_queries(rate_interval="1m")


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus, after it has seen a server answer some images and one file that is none."""
    folder = tmp_path_factory.mktemp("prometheus")
    publish(folder / "models")
    arguments = ("--model-repo", str(folder / "models"), "--threads", "1")
    with (
        run_server(folder / "server.log", *arguments) as server,
        run_prometheus(folder, server.url) as scraper,
    ):
        picture = encode_picture(draw_picture())
        # In two parts: a series that is born between two scrapes has no rate at first.
        for bodies in ([picture], [picture] * (IMAGES - 1) + [b"no image"]):
            statuses = [post(server.url, body) for body in bodies]
            assert statuses == [200 if body == picture else 415 for body in bodies]
            scraper.await_scrapes(2)
        yield scraper


def post(url: str, body: bytes) -> int:
    headers = {"Content-Type": "image/png"}
    return httpx.post(
        f"{url}/segment", content=body, headers=headers, timeout=60, trust_env=False
    ).status_code


def test_the_target_is_up(prometheus: Prometheus) -> None:
    (target,) = prometheus.get("/api/v1/targets")["activeTargets"]
    assert target["health"] == "up", target["lastError"]


@pytest.mark.parametrize(
    ("title", "text"), QUERIES, ids=[f"{i}-{title}" for i, (title, _) in enumerate(QUERIES)]
)
def test_a_query_of_the_dashboard_is_answered(
    prometheus: Prometheus, title: str, text: str
) -> None:
    result = prometheus.query(text)
    assert result or title in MAY_BE_EMPTY, text
    for series in result:
        assert math.isfinite(float(series["value"][1])), (text, series)


def test_the_counters_count_exactly(prometheus: Prometheus) -> None:
    (images,) = prometheus.query("solo_images_total")
    assert float(images["value"][1]) == IMAGES
    by_status = prometheus.query('sum by (status) (solo_requests_total{route="/segment"})')
    counts = {series["metric"]["status"]: float(series["value"][1]) for series in by_status}
    assert counts == {"200": IMAGES, "415": 1}
    (total,) = prometheus.query('solo_stage_duration_seconds_count{stage="total"}')
    assert float(total["value"][1]) == IMAGES


def test_all_rules_are_loaded_and_none_fires(prometheus: Prometheus) -> None:
    rules = [rule for group in prometheus.get("/api/v1/rules")["groups"] for rule in group["rules"]]
    assert len(rules) == len(load_rules())
    assert [rule["name"] for rule in rules if rule.get("lastError")] == []
    # Latency depends on the machine; everything else must be quiet.
    firing = {rule["name"] for rule in rules if rule.get("state") == "firing"}
    assert firing <= {"SoloLatencyBudgetBurns", "SoloLatencyBudgetBurnsFast"}
