"""docs/operations.md names what there is, and all of it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from pipeline.repository_config import VersionPolicy
from service.observe.metrics import CANCELLATIONS, REJECTIONS, STAGES
from service.settings import Settings
from tests.deploy.queries import dashboard_queries, load_rules, metric_names

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/operations.md").read_text(encoding="utf-8")


def read_rows(heading: str) -> dict[str, str]:
    """The rows of the table below a heading, by each name in their first cell."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|", 1) for line in section.splitlines() if line[:1] == "|"][2:]
    return {name: rest for first, rest in rows for name in re.findall(r"`(\w+)`", first)}


def test_every_metric_has_a_row() -> None:
    shown = set().union(*(metric_names(query) for _, query in dashboard_queries()))
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    assert set(read_rows("Metrics")) == {name for name in families if name.startswith("solo_")}


@pytest.mark.parametrize(
    ("metric", "values"),
    [
        ("solo_rejections_total", REJECTIONS),
        ("solo_cancelled_images_total", CANCELLATIONS),
        ("solo_stage_duration_seconds", STAGES),
    ],
)
def test_values_of_labels_are_named(metric: str, values: tuple[str, ...]) -> None:
    row = read_rows("Metrics")[metric]
    assert [value for value in values if f"`{value}`" not in row] == []


def test_every_alert_has_a_row() -> None:
    assert set(read_rows("Alerts")) == {rule["alert"] for rule in load_rules() if "alert" in rule}


def test_every_variable_is_a_setting() -> None:
    named = {name.lower() for name in re.findall(r"SOLO_([A-Z_]+\w)", TEXT)}
    assert len(named) > 20
    assert named <= set(Settings.model_fields)


@pytest.mark.parametrize(
    "name",
    [
        "port",
        "max_queue_canvases",
        "max_image_canvases",
        "max_decoded_pixels",
        "engine_timeout_s",
        "max_batch",
    ],
)
def test_defaults_are_true(name: str) -> None:
    row = read_rows("What to set")[f"SOLO_{name.upper()}"]
    assert f"{Settings.model_fields[name].default:,.0f}" in row.split("|")[0].replace(
        "8000", "8,000"
    )


def test_version_policies_are_taken() -> None:
    (block,) = re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)
    policies = [json.loads(line)["serve"] for line in block.splitlines()]
    parsed = [TypeAdapter[VersionPolicy](VersionPolicy).validate_python(one) for one in policies]
    assert [policy.policy for policy in parsed] == ["latest", "all", "specific"]


def test_the_commands_for_keys_work(tmp_path: Path) -> None:
    (block,) = re.findall(r"```sh\n(python -m service\.http\.keys.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines():
        command = [sys.executable, *shlex.split(line)[1:]]
        environment = {"PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    keys = json.loads((tmp_path / "keys.json").read_bytes())["keys"]
    assert [key["name"] for key in keys] == ["shop", "operator"]
    assert keys[1]["admin"] is True
