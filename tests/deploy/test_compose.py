"""docker-compose.yml as data: what it starts, in which order, with which rights."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
SERVERS = ("server", "server-b", "server-gpu")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
    return loaded


def test_what_is_started(compose: dict[str, Any]) -> None:
    profiles = {name: service.get("profiles") for name, service in compose["services"].items()}
    assert profiles == {
        **dict.fromkeys(("server", "prometheus", "alertmanager", "grafana")),
        "server-b": ["proxy"],
        "proxy": ["proxy"],
        "server-gpu": ["gpu"],
    }


def test_each_service_is_watched_restarted_and_bounded(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        check = service["healthcheck"]
        assert check["test"][0] == "CMD", name
        assert {"interval", "timeout", "retries", "start_period"} <= set(check), name
        assert service["restart"] == "unless-stopped", name
        assert service["mem_limit"], name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert {"max-size", "max-file"} == set(service["logging"]["options"]), name


def test_nothing_waits_for_another_service(compose: dict[str, Any]) -> None:
    assert not [name for name, service in compose["services"].items() if "depends_on" in service]


def test_only_the_proxy_is_reached_from_outside_unless_chosen(compose: dict[str, Any]) -> None:
    outside = {
        name
        for name, service in compose["services"].items()
        for port in service.get("ports", [])
        if not port.startswith(("127.0.0.1:", "${SOLO_HOST:-127.0.0.1}:"))
    }
    assert outside == {"proxy"}


def test_prometheus_keeps_a_bounded_size(compose: dict[str, Any]) -> None:
    command = " ".join(compose["services"]["prometheus"]["command"])
    assert "--storage.tsdb.retention.size=${PROMETHEUS_DISK:-" in command


def test_no_password_has_a_default(compose: dict[str, Any]) -> None:
    grafana = compose["services"]["grafana"]
    assert grafana["environment"]["GF_SECURITY_ADMIN_PASSWORD"] == "${GRAFANA_ADMIN_PASSWORD:-}"


@pytest.mark.parametrize(("password", "expected"), [("", "no admin: true"), ("x y", "no admin: ")])
def test_grafana_has_an_administrator_only_with_a_password(
    compose: dict[str, Any], password: str, expected: str
) -> None:
    *shell, script = compose["services"]["grafana"]["entrypoint"]
    variable = "GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"
    script = script.replace("exec /run.sh", f'echo "no admin: ${variable}"').replace("$$", "$")
    done = subprocess.run(
        [*shell, script],
        env={"GF_SECURITY_ADMIN_PASSWORD": password},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{expected}\n"


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_has_few_rights(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    assert "${MODEL_DIR:-./model_repo}:/models:ro" in service["volumes"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert not service.get("privileges")


def test_the_gpu_is_asked_for_by_the_gpu_server_alone(compose: dict[str, Any]) -> None:
    asks = {name for name, service in compose["services"].items() if "deploy" in service}
    assert asks == {"server-gpu"}
    (device,) = compose["services"]["server-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert device["device_ids"] == ["${GPU_IDS:-0}"]
    assert device["capabilities"] == ["gpu"]


def test_engines_that_were_built_outlive_the_container(compose: dict[str, Any]) -> None:
    from tests.deploy.test_dockerfiles import last_stage

    assert "engine-cache:/cache" in compose["services"]["server-gpu"]["volumes"]
    assert ("VOLUME", "/cache") in last_stage("docker/Dockerfile.gpu")


def test_building_an_engine_is_no_ill_health(compose: dict[str, Any]) -> None:
    from tests.deploy.test_dockerfiles import last_stage

    period = compose["services"]["server-gpu"]["healthcheck"]["start_period"]
    assert int(period.removesuffix("s")) >= 600
    (check,) = [rest for word, rest in last_stage("docker/Dockerfile.gpu") if word == "HEALTHCHECK"]
    assert f"--start-period={period}" in check


@pytest.mark.parametrize("name", SERVERS)
def test_every_setting_reaches_the_server(compose: dict[str, Any], name: str) -> None:
    environment = compose["services"][name]["environment"]
    assert set(environment) == {f"SOLO_{field.upper()}" for field in Settings.model_fields}
    fixed = {"SOLO_HOST": "0.0.0.0", "SOLO_PORT": "8000", "SOLO_MODEL_REPO": "/models"}
    defaults = ["SOLO_MODEL_POLL_S"]
    if name == "server-gpu":
        fixed["SOLO_ENGINE_CACHE"] = "/cache/engines"
        defaults += ["SOLO_MAX_BATCH", "SOLO_PRECISION"]
    for variable, value in environment.items():
        if variable in defaults:
            assert value.startswith(f"${{{variable}:-")
        else:
            assert value == fixed.get(variable), variable


def test_all_servers_share_the_jobs(compose: dict[str, Any]) -> None:
    from tests.deploy.test_dockerfiles import last_stage

    for name in SERVERS:
        assert "jobs-data:/jobs" in compose["services"][name]["volumes"]
    for file in ("docker/Dockerfile", "docker/Dockerfile.gpu"):
        (made,) = [rest for word, rest in last_stage(file) if "useradd" in rest]
        assert "install --directory --mode=1777 /jobs" in made


def test_the_example_names_what_the_compose_file_reads() -> None:
    text = (ROOT / "docker-compose.yml").read_text("utf-8")
    read = set(re.findall(r"\$\{(\w+)[:}]", text)) | {"COMPOSE_PROFILES"}
    read |= set(re.findall(r"^      (ALERT_\w+):$", text, re.MULTILINE))
    read |= {f"SOLO_{field.upper()}" for field in Settings.model_fields}
    lines = (ROOT / ".env.example").read_text("utf-8").splitlines()
    named = [line[1:].split("=")[0] for line in lines if re.match(r"#[A-Z_]+=", line)]
    assert len(named) > 20
    assert len(set(named)) == len(named)
    assert set(named) <= read


def test_the_servers_images_have_the_projects_version(compose: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for name in SERVERS:
        tag = compose["services"][name]["image"].split(":")[-1].rstrip("}")
        assert tag.removesuffix("-gpu") == project["version"]


def test_images_are_pinned(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert re.search(r":v?\d+\.\d+\.\d+(-gpu)?}?$", service["image"]), (name, service["image"])


def test_two_servers_do_not_want_one_port(compose: dict[str, Any]) -> None:
    services = compose["services"].values()
    ports = [
        port.split(":-")[-1].split("}")[0] for each in services for port in each.get("ports", [])
    ]
    assert sorted(ports) == ["3000", "443", "80", "8000", "8001", "9090", "9093"]


def test_every_file_that_is_mounted_or_built_exists(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        volumes = [re.sub(r"\$\{\w+:-(.*?)}", r"\1", volume) for volume in service["volumes"]]
        sources = [volume.split(":")[0] for volume in volumes]
        if "build" in service:
            sources.append("./" + service["build"]["dockerfile"])
        for source in sources:
            if source.startswith("."):
                assert (ROOT / source).exists(), source
            else:
                assert source in compose["volumes"]


def test_prometheus_scrapes_the_services_by_name(compose: dict[str, Any]) -> None:
    config = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text("utf-8"))
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "solo-serve"  # the rules and the dashboard select it by this name
    assert job["static_configs"] == [{"targets": ["server:8000"]}]
    assert job["dns_sd_configs"][0]["names"] == ["server-b", "server-gpu"]
    (manager,) = config["alerting"]["alertmanagers"]
    assert manager == {"static_configs": [{"targets": ["alertmanager:9093"]}]}
    assert set(SERVERS) <= set(compose["services"])


def test_the_server_outlives_its_own_draining(compose: dict[str, Any]) -> None:
    grace = re.fullmatch(
        r"\$\{STOP_GRACE:-(\d+)s}", compose["services"]["server"]["stop_grace_period"]
    )
    assert grace
    grace_s = int(grace.group(1))
    assert grace_s > Settings.model_fields["drain_timeout_s"].default
