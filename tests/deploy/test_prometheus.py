"""The real Prometheus scrapes the real server and answers the dashboard's queries."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.processes import ROOT, Running, free_port, running, running_server
from tests.deploy.queries import dashboard_queries, load_rules
from tests.support.blob_model import draw_picture, encode_picture, publish

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None,
    reason="prometheus is not installed (Debian: apt-get install prometheus)",
)

IMAGES = 12
# Series that exist only after something went wrong that this test does not bring about.
MAY_BE_EMPTY = {"Refused models"}
# 0 / 0 where nothing happened within the interval would be no answer; all of these saw traffic.
RATE_INTERVAL = "30s"


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Running]]:
    """A server that has answered some images, and a Prometheus that has seen it do so."""
    folder = tmp_path_factory.mktemp("prometheus")
    publish(folder / "models")
    with (
        running_server(folder / "models", folder) as server,
        running_prometheus(folder, server.port) as scraper,
    ):
        # In two parts: a series that is born between two scrapes has no rate at first.
        for part in (1, IMAGES - 1):
            for _ in range(part):
                assert post(server, encode_picture(draw_picture())) == 200
            await_scrapes(scraper, await_scrapes(scraper, 0) + 2)
        assert post(server, b"no image") == 415
        await_scrapes(scraper, await_scrapes(scraper, 0) + 2)
        yield server, scraper


def running_prometheus(folder: Path, server_port: int) -> Any:
    """Prometheus with the project's own configuration, but for the target and a faster pace."""
    config = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text("utf-8"))
    config["global"] = dict.fromkeys(config["global"], "1s")
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{server_port}"]}]
    del job["dns_sd_configs"]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    shutil.copy(ROOT / "docker/prometheus/rules.yml", folder)
    port = free_port()
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}"]
    command += [f"--storage.tsdb.path={folder / 'tsdb'}", f"--web.listen-address=127.0.0.1:{port}"]
    return running(command, port, "/-/ready", folder, dict(os.environ))


def post(server: Running, body: bytes) -> int:
    return server.request("POST", "/segment", body, {"Content-Type": "image/png"})[0]


def query(scraper: Running, text: str) -> list[dict[str, Any]]:
    answer = scraper.get_json("/api/v1/query", query=text)
    assert answer["status"] == "success"
    result: list[dict[str, Any]] = answer["data"]["result"]
    return result


def await_scrapes(scraper: Running, more_than: int) -> int:
    """Waits until Prometheus has more good scrapes than this; returns how many it has."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = query(scraper, 'sum(sum_over_time(up{job="solo-serve"}[1h]))')
        if found and float(found[0]["value"][1]) > more_than:
            return int(float(found[0]["value"][1]))
        time.sleep(0.2)
    raise AssertionError(f"no scrape: {scraper.log.read_text()[-2000:]}")


def test_the_target_is_up(prometheus: tuple[Running, Running]) -> None:
    _, scraper = prometheus
    (target,) = scraper.get_json("/api/v1/targets")["data"]["activeTargets"]
    assert target["health"] == "up", target["lastError"]


@pytest.mark.parametrize(
    ("title", "text"),
    dashboard_queries(RATE_INTERVAL),
    ids=[f"{i}-{title}" for i, (title, _) in enumerate(dashboard_queries())],
)
def test_a_query_of_the_dashboard_is_answered(
    prometheus: tuple[Running, Running], title: str, text: str
) -> None:
    result = query(prometheus[1], text)
    assert result or title in MAY_BE_EMPTY, text
    for series in result:
        assert math.isfinite(float(series["value"][1])), (text, series)


def test_the_counters_count_exactly(prometheus: tuple[Running, Running]) -> None:
    _, scraper = prometheus
    (images,) = query(scraper, "solo_images_total")
    assert float(images["value"][1]) == IMAGES
    by_status = query(scraper, 'sum by (status) (solo_requests_total{route="/segment"})')
    counts = {series["metric"]["status"]: float(series["value"][1]) for series in by_status}
    assert counts.pop("200") == IMAGES
    assert list(counts.values()) == [1]
    (total,) = query(scraper, 'solo_stage_duration_seconds_count{stage="total"}')
    assert float(total["value"][1]) == IMAGES


def test_all_rules_are_loaded_and_none_fires(prometheus: tuple[Running, Running]) -> None:
    _, scraper = prometheus
    groups = scraper.get_json("/api/v1/rules")["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == len(load_rules())
    assert [rule["name"] for rule in rules if rule.get("lastError")] == []
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []
