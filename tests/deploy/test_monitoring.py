"""Dashboard and rules ask only for what the server really exports; promtool accepts them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from pipeline.answer_match import AnswerMatch
from service.engines.state import EngineState
from service.observe.gpus import GpuCollector
from service.observe.metrics import Metrics
from tests.deploy.queries import (
    dashboard_queries,
    label_names,
    load_dashboard,
    load_rules,
    metric_names,
)
from tests.support.fake_nvml import FakeNvml
from tests.support.metrics import render

ENGINE = EngineState(
    "onnxruntime", "cpu", "fp32", "CPU provider", canvas_s={"onnxruntime fp32": 0.04}
)
ROOT = Path(__file__).resolve().parents[2]
# Prometheus' own series, and the labels that it adds.
SCRAPE_METRICS = {"up"}
SCRAPE_LABELS = {"job", "instance"}

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="promtool is not installed (Debian: apt-get install prometheus)",
)


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Every sample name that a server exports, with its labels."""
    metrics = Metrics()
    metrics.add_model("nuclei", 1, lambda: ENGINE, 8)
    gpus = GpuCollector(FakeNvml())
    gpus.read()
    metrics.watch_gpus(gpus)
    metrics.model_refused.labels("broken").set(1)
    metrics.count_error("nuclei", 1, "corrupt_image")
    metrics.shadow.begin("nuclei", 2)
    metrics.shadow.add("nuclei", 2, AnswerMatch((0.9,), (0.1,), (0, 1)))
    metrics.shadow.decisions.labels("nuclei", "promoted").inc()
    metrics.requests.labels("/segment", "POST", "200").inc()
    metrics.request_seconds.labels("/segment", "POST").observe(0.1)
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(render(metrics)):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def all_queries() -> list[tuple[str, str]]:
    rules = [(rule.get("alert") or rule["record"], rule["expr"]) for rule in load_rules()]
    return [*dashboard_queries(), *rules]


@pytest.mark.parametrize(("place", "query"), all_queries())
def test_a_query_reads_only_what_is_exported(
    place: str, query: str, exported: dict[str, set[str]]
) -> None:
    recorded = {rule["record"] for rule in load_rules() if "record" in rule}
    names = metric_names(query)
    assert names, f"{place}: no metric in {query}"
    assert names - set(exported) - recorded - SCRAPE_METRICS == set()
    for name, labels in label_names(query).items():
        assert labels - exported.get(name, set()) - SCRAPE_LABELS == set(), f"{place}: {name}"


def test_every_metric_of_the_server_is_on_the_dashboard(exported: dict[str, set[str]]) -> None:
    shown = set().union(*(metric_names(query) for _, query in dashboard_queries()))
    ours = {name for name in exported if name.startswith("solo_")}
    families = {
        name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
        for name in ours
        if not name.endswith("_created")
    }
    missing = {f for f in families if not any(name.startswith(f) for name in shown)}
    assert missing == set()


def test_selected_label_values_exist(exported: dict[str, set[str]]) -> None:
    from service.observe.metrics import REJECTIONS, STAGES

    text = " ".join(query for _, query in all_queries())
    assert 'stage="total"' in text
    assert "total" in STAGES
    patterns = re.findall(r'reason=~"([^"]*)"', text)
    assert patterns
    for pattern in patterns:
        assert all(reason in REJECTIONS for reason in pattern.split("|")), pattern
    samples = Metrics()
    samples.add_model("nuclei", 1, lambda: ENGINE, 8)
    assert 'le="0.5",model="nuclei",stage="total"' in render(samples)


def test_the_dashboard_shows_what_was_asked_for() -> None:
    text = " ".join(title.lower() for title, _ in dashboard_queries())
    for word in (
        "p50",
        "p95",
        "p99",
        "fps",
        "batch size",
        "queue",
        "rejections",
        "errors",
        "models",
    ):
        assert word in text, word


def test_panels_have_ids_sources_and_do_not_overlap() -> None:
    panels: list[dict[str, Any]] = load_dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert max(x for x, _ in cells) < 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"], panel["title"]
            assert panel["datasource"]["type"] == "prometheus"


def test_provisioning_leads_to_the_dashboard() -> None:
    folder = ROOT / "docker/grafana/provisioning"
    sources = yaml.safe_load((folder / "datasources/prometheus.yml").read_text("utf-8"))
    (source,) = sources["datasources"]
    variables = {v["name"]: v for v in load_dashboard()["templating"]["list"]}
    assert source["uid"] == variables["datasource"]["current"]["value"]
    assert source["url"] == "http://prometheus:9090"
    providers = yaml.safe_load((folder / "dashboards/solo-serve.yml").read_text("utf-8"))
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
    path = providers["providers"][0]["options"]["path"]
    assert f"./docker/grafana/dashboards:{path}:ro" in compose["services"]["grafana"]["volumes"]


def test_every_alert_has_a_severity_and_a_summary() -> None:
    alerts = [rule for rule in load_rules() if "alert" in rule]
    assert alerts
    for alert in alerts:
        assert alert["labels"]["severity"] in ("critical", "warning"), alert["alert"]
        assert alert["annotations"]["summary"], alert["alert"]


def test_every_alert_is_tested_where_it_fires_and_where_it_does_not() -> None:
    text = (ROOT / "docker/prometheus/rules_test.yml").read_text(encoding="utf-8")
    cases = [case for test in yaml.safe_load(text)["tests"] for case in test["alert_rule_test"]]
    fires = {case["alertname"] for case in cases if case["exp_alerts"]}
    silent = {case["alertname"] for case in cases if not case["exp_alerts"]}
    assert fires == silent == {rule["alert"] for rule in load_rules() if "alert" in rule}


def test_requests_are_those_of_the_routes_that_segment() -> None:
    from service.observe.metrics import WORK_ROUTES

    selectors = set(re.findall(r'route([=!]~?)"([^"]*)"', " ".join(q for _, q in all_queries())))
    ((operator, pattern),) = selectors
    assert operator == "=~"
    other = ("/v2/models/{name}", "/v2/models/{name}/ready", "/metrics", "unmatched")
    assert all(re.fullmatch(pattern, route) for route in WORK_ROUTES)
    assert not any(re.fullmatch(pattern, route) for route in other)


@needs_promtool
@pytest.mark.parametrize(
    "command",
    [
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "rules.yml"],
        ["test", "rules", "rules_test.yml"],
    ],
    ids=" ".join,
)
def test_promtool_accepts(command: list[str]) -> None:
    done = subprocess.run(
        ["promtool", *command],
        cwd=ROOT / "docker/prometheus",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout + done.stderr


@needs_promtool
def test_promtool_accepts_the_metrics_page() -> None:
    metrics = Metrics()
    metrics.add_model("nuclei", 1, lambda: ENGINE, 8)
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=render(metrics).encode(),
        capture_output=True,
        check=False,
    )
    complaints = [line for line in done.stderr.decode().splitlines() if line.startswith("solo_")]
    assert complaints == []


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ('sum by (le) (rate(a_bucket{x="b", y=~"c.*"}[5m])) / b_total', {"a_bucket", "b_total"}),
        ("max(a / on (x) group_left b) > 0.5 and c:d == 1", {"a", "b", "c:d"}),
        ("histogram_quantile(0.95, sum by (le, stage) (rate(h_bucket[1m])))", {"h_bucket"}),
    ],
)
def test_metric_names_of_a_query(query: str, names: set[str]) -> None:
    assert metric_names(query) == names
