"""The PromQL of the dashboard and of the rules, and the metric names in it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "docker/grafana/dashboards/solo-serve.json"
RULES = ROOT / "docker/prometheus/rules.yml"

_WORDS = {"by", "without", "and", "or", "unless", "on", "ignoring", "group_left", "bool", "offset"}


def load_dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return loaded


def load_rules() -> list[dict[str, Any]]:
    """All rules of all groups, recording and alerting."""
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard_queries(rate_interval: str = "1m") -> list[tuple[str, str]]:
    """Each (panel title, query), with Grafana's variables filled in."""
    found = []
    for panel in load_dashboard()["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"].replace("$__rate_interval", rate_interval)
            query = query.replace("$model", ".*")
            assert "$" not in query, f"{panel['title']}: unknown variable in {query}"
            found.append((panel["title"], query))
    return found


def metric_names(query: str) -> set[str]:
    """The metrics that a query reads: its identifiers but functions, labels and words."""
    text = re.sub(r'"[^"]*"', "", query)
    text = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", text)
    text = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", " ", text)
    identifiers = re.findall(r"[A-Za-z_:][\w:]*(?!\w|:)(?!\s*\()", text)
    return {name for name in identifiers if name not in _WORDS}


def label_names(query: str) -> dict[str, set[str]]:
    """The labels that a query selects by, for each metric."""
    found: dict[str, set[str]] = {}
    for name, selector in re.findall(r"([A-Za-z_:][\w:]*)\{([^}]*)\}", query):
        found.setdefault(name, set()).update(re.findall(r"(\w+)\s*[=!]~?", selector))
    return found
